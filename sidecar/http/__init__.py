"""HTTP faces of the sidecar. They run outside the engine and reach it like any other client."""
