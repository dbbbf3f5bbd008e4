"""Fetching from the Hugging Face Hub, through huggingface_hub.

The library finds the file (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), states its size and LFS hash, and moves
the bytes with its own client (proxies, certificates, retries). `hf_hub_download` is not used: since
huggingface_hub 2 it keeps nothing of a download that ended early, and before that its partial files were
its own affair. Its `http_get` writes into any file, so here it resumes our part. The price is that the
Xet transfer, which cannot resume and takes much memory, is not used; the Hub serves the same bytes over
plain https.
"""

from __future__ import annotations

import re

from ...errors import FetchError
from ..manifest import HubSource
from .part import Part

_ADVICE = {
    401: "the repository does not exist, or wants a login: set HF_TOKEN",
    403: "access is not granted: accept the terms on the model's page and set HF_TOKEN",
    404: "there is no such repository, revision or file",
    429: "too many requests, try again later or set HF_TOKEN",
}


def download(source: HubSource, part: Part, size: int | None, sha256: str | None) -> str | None:
    """Bring the rest of the file into the part.

    Args:
        source: where the file is.
        part: where the bytes go. One that belongs to another version of the file is started again.
        size: bytes of the whole file, as the manifest says; None: not known.
        sha256: of the whole file, when known; compared before anything is fetched.

    Returns:
        The sha256 that the Hub states, or None: a file outside LFS, or a mirror that does not say.

    Raises:
        FetchError: the Hub does not give the file, or states another size or hash.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    url = hf_hub_url(source.repo, source.file, revision=source.revision)
    try:
        metadata = get_hf_file_metadata(url)
        if metadata.commit_hash is None or metadata.etag is None:
            raise FetchError(
                f"{url} does not answer as the Hub does; check HF_ENDPOINT, proxy and network login"
            )
        promised = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag) else None
        _compare(promised, sha256)
        if part.identity != metadata.etag or (metadata.size is not None and part.tell() > metadata.size):
            part.restart(metadata.etag)
        if metadata.size is not None:
            part.expect(metadata.size, size)
        http_get(
            hf_hub_url(source.repo, source.file, revision=metadata.commit_hash),
            part,  # type: ignore[arg-type,unused-ignore]  # has the methods of a file that http_get uses
            resume_size=part.tell(),
            headers=build_hf_headers(),
            expected_size=metadata.size,
            displayed_filename=part.path.name.removesuffix(".part"),
        )
    except FetchError:
        raise
    except Exception as error:  # requests, httpx and httpx2 errors, by version of the library
        raise FetchError(_explain(url, error)) from error
    return promised


def _compare(promised: str | None, known: str | None) -> None:
    if promised and known and promised != known:
        raise FetchError(
            f"the Hub offers a file with sha256 {promised}, but {known} is expected; not fetched"
        )


def _explain(url: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _ADVICE:
        return f"{url}: the Hub answers {status}: {_ADVICE[status]}"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{url}: {reason}"
