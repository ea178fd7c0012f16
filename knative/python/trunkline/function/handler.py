from trunkline import model

# Nothing is asked of the sidecar before the first request.
m = model("classify")


def handle(event, context):
    """Answer with what the model takes. Replace this with numpy in, numpy out: ``scores = m(image)``."""
    inputs = {spec.name: [spec.dtype, *spec.shape] for spec in m.signature.inputs}
    return {"statusCode": 200, "body": {"model": m.name, "inputs": inputs}}
