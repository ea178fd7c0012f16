"""A pull: a model fetched from an origin into the store, only what that lacks, and nothing believed before it is checked.

In this order: the manifest, which must have the digest that was asked for; its signature, where the operator wants one; the
graph; the weights that are missing. What was received whole stays when a later file cannot be had. Runs in a thread of the admin
endpoint. Must not import torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sidecar import fetching
from sidecar.bundle import MAX_MANIFEST_BYTES, Bundle, canonical_graph, manifest_bytes, parse_bundle, parse_manifest
from sidecar.errors import BlobCorrupt, BundleError, NotAtOrigin, NotTrusted
from sidecar.graphfile import MAX_GRAPH_BYTES
from sidecar.jobs import Watch
from sidecar.origins import Policy, Reference, blob_file, graph_file, manifest_file, signature_file
from sidecar.signers import SIGNATURE_BYTES, read_signers, verify
from sidecar.store import Store
from sidecar.versions import Versions, Vet


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: ``fetched_bytes`` came over, of the ``blob_bytes`` of all weights. ``signer``: who signed it."""

    name: str
    version: str
    digest: str
    signer: str | None
    fetched_count: int
    blob_count: int
    fetched_bytes: int
    blob_bytes: int


def pull(
    reference: Reference, store: Store, policy: Policy, watch: Watch, *, name: str | None = None, vet: Vet | None = None
) -> Pulled:
    """Fetch a model and publish it in the store, as ``name`` where one is given; ``vet`` looks at its files first.

    Raises OriginRefused, OriginFailed, NotAtOrigin, NotTrusted, BlobCorrupt, BundleError, StoreError, ConfigError,
    InvalidInput.
    """
    policy.check(reference.origin)
    with fetching.opened(
        reference.origin,
        networks=policy.networks,
        idle_s=policy.idle_s,
        timeout_s=policy.timeout_s,
        checkpoint=watch.checkpoint,
    ) as files:
        watch.advance(0, 0, "bytes", "manifest")
        manifest = _checked(files, manifest_file(reference.digest), reference.digest, MAX_MANIFEST_BYTES)
        signer = None if policy.signers is None else _signer(files, reference.digest, manifest, policy.signers)
        named = parse_manifest(manifest)
        if named.name != reference.name:
            raise BundleError(f"the manifest is that of {named.name}, not of {reference.name}", model=reference.name)
        watch.advance(0, 0, "bytes", "graph")
        graph = _checked(files, graph_file(named.graph_digest), named.graph_digest, MAX_GRAPH_BYTES)
        if vet is not None:
            vet(manifest, graph)
        bundle = parse_bundle(manifest, graph)
        fetched_count, fetched_bytes = _fetch_blobs(files, bundle, store, policy, watch)
    if name is not None:
        bundle = dataclasses.replace(bundle, name=name)
    Versions(store).put(manifest_bytes(bundle), canonical_graph(bundle.graph))
    sizes = {weight.digest: weight.size_bytes for weight in bundle.graph.weights}
    return Pulled(
        name=bundle.name,
        version=bundle.version,
        digest=reference.digest,
        signer=signer,
        fetched_count=fetched_count,
        blob_count=len(sizes),
        fetched_bytes=fetched_bytes,
        blob_bytes=sum(sizes.values()),
    )


def _checked(files: fetching.Files, path: str, digest: str, limit_bytes: int) -> bytes:
    content = files.read(path, limit_bytes)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise BlobCorrupt(f"{path} at the origin has digest {found[:12]}; it was altered, or is another file", digest=digest)
    return content


def _signer(files: fetching.Files, digest: str, manifest: bytes, trusted: Path) -> str:
    # Read anew each time, so that a key that is taken off the list counts no more.
    signers = read_signers(trusted)
    try:
        signature = files.read(signature_file(digest), SIGNATURE_BYTES)
    except NotAtOrigin as error:
        raise NotTrusted("the model is not signed, and this sidecar takes only what is; publish it with --sign-key") from error
    return verify(manifest, signature, signers)


def _fetch_blobs(files: fetching.Files, bundle: Bundle, store: Store, policy: Policy, watch: Watch) -> tuple[int, int]:
    """Fetch the weights that the store lacks; return how many, and how many bytes came over."""
    sizes = {weight.digest: weight.size_bytes for weight in bundle.graph.weights}
    largest_bytes = max(sizes.values(), default=0)
    if largest_bytes > policy.blob_limit_bytes:
        raise BundleError(
            f"a weight of {bundle.name} has {largest_bytes} bytes, the limit is {policy.blob_limit_bytes} (--blob-limit)",
            limit_bytes=policy.blob_limit_bytes,
        )
    missing = store.missing(sizes)
    total_bytes = sum(sizes[digest] for digest in missing)
    store.check_room(total_bytes)
    done_bytes = fetched_bytes = 0
    for number, digest in enumerate(missing, 1):

        def told(came_bytes: int, before: int = done_bytes, step: str = f"weight {number} of {len(missing)}") -> None:
            watch.advance(before + came_bytes, total_bytes, "bytes", step)

        told(0)
        fetched_bytes += _fetch_blob(files, digest, sizes[digest], store, told)
        done_bytes += sizes[digest]
    watch.advance(total_bytes, total_bytes, "bytes", "publishing")
    return len(missing), fetched_bytes


def _fetch_blob(files: fetching.Files, digest: str, size_bytes: int, store: Store, told: Callable[[int], None]) -> int:
    with contextlib.ExitStack() as stack:

        def fetch(start: int) -> Iterator[bytes]:
            chunks = stack.enter_context(contextlib.closing(files.chunks(blob_file(digest), start, size_bytes)))
            return _counted(chunks, start, told)

        return store.resume_blob(digest, fetch, size_bytes)


def _counted(chunks: Iterable[bytes], came_bytes: int, told: Callable[[int], None]) -> Iterator[bytes]:
    told(came_bytes)
    for chunk in chunks:
        yield chunk
        came_bytes += len(chunk)
        told(came_bytes)
