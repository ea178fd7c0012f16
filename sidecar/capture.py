"""Capturing: torch.export on a publisher's model, and its many ways to fail put into one sentence.

The captured graph is functional, and composite operators are whole. Part of the converter; must not import anything
above layer 2.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram

from sidecar.calls import Call
from sidecar.errors import UnsupportedModel
from sidecar.sources import BATCH

# What model code and torch's tracing of it can raise; torch's own errors derive from RuntimeError.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)

_OWN_FOLDERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

# Operators that are taken apart although torch could keep them: an equation in a string has no form in a bundle.
_TAKEN_APART = (torch.ops.aten.einsum.default,)


def capture(call: Call) -> ExportedProgram:
    """Return the functional graph of a call. Raises UnsupportedModel naming line and module where torch knows them."""
    args, kwargs = call.arguments(call.examples)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(call.module, args, kwargs, dynamic_shapes=call.dynamic_shapes(), strict=False)
            known = torch.export.default_decompositions()
            functional: ExportedProgram = program.run_decompositions({target: known[target] for target in _TAKEN_APART})
            return functional
    except FAILURES as error:
        raise UnsupportedModel(_explain(error, call), **_place(error, call.module)) from error


def describe(error: Exception, call: Call) -> str:
    """Return an error's class, its first line, and the place in the model's own code where it came up."""
    line = next((line.strip(" -") for line in str(error).splitlines() if line.strip()), "")
    place = _place(error, call.module)
    where = f" at {place['line']}" if "line" in place else ""
    module = f" in self.{place['module']}" if place.get("module") else ""
    return f"{type(error).__name__}{where}{module}: {line[:300]}"


def _explain(error: Exception, call: Call) -> str:
    text = str(error)
    if "data-dependent" in text or "data dependent" in text:
        return f"the model's control flow depends on the values of tensors: {describe(error, call)}"
    fixed = next((name for name in call.symbols if "onstraints violated" in text and name in text), None)
    if fixed is None:
        return f"torch cannot capture the model: {describe(error, call)}"
    axes = [
        f"axis {axis} of {tensor}" for tensor, table in call.axes.items() for axis, symbol in table.items() if symbol == fixed
    ]
    reasons = (line.strip(" -") for line in text.splitlines() if line.lstrip().startswith("- "))
    advice = "convert with batch=False to fix the batch size" if fixed == BATCH else "leave it out of dynamic_axes"
    return (
        f"{fixed} ({', '.join(axes)}) cannot vary because the model fixes it; {advice}. torch says: {next(reasons, text)[:200]}"
    )


def _place(error: Exception, module: torch.nn.Module) -> dict[str, str]:
    """Return the innermost line of the model's own code on an error's way, and the module that was running there."""
    names = {id(member): name for name, member in module.named_modules()}
    found: dict[str, str] = {}
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        module_name = names.get(id(frame.f_locals.get("self")))
        if module_name is not None:
            found["module"] = module_name
        file = frame.f_code.co_filename
        if not file.startswith((*_OWN_FOLDERS, "<")):
            found["line"] = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's tracing from talking to the publisher about its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
