"""Models of the Hugging Face hub: their snapshots, and one sentence for each reason why there is none.

Everything of a download is huggingface_hub's: a file whose connection breaks goes on where it was, whole files are not fetched again
after a kill, bars show how far it is, $HF_HOME says where files go, $HF_ENDPOINT where they come from, $HF_HUB_OFFLINE that nothing
is fetched. No code of a repository is fetched or run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from unipic2_jax.core.errors import closest

# Ids that recipes and documents name: what a misspelt one is compared with.
KNOWN = (
    "stabilityai/stable-diffusion-3.5-medium",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Skywork/UniPic2-SD3.5M-Kontext-2B",
    "Skywork/UniPic2-SD3.5M-Kontext-GRPO-2B",
    "Skywork/UniPic2-Metaquery-9B",
    "Skywork/UniPic2-Metaquery-GRPO-9B",
    "deepgenteam/DeepGen-1.0",
)
# 'owner/name', and '@revision' (a branch, a tag or a commit) behind it.
_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w][\w./-]*))?")


def is_id(source: str | os.PathLike[str]) -> bool:
    """Whether this may be the id of a model: 'owner/name' or 'owner/name@revision'."""
    return bool(_ID.fullmatch(os.fspath(source)))


def snapshot(source: str, patterns: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """The local folder with what a model's repository has of `patterns`, fetched where it is not in the cache.

    Args:
      source: 'owner/name', or 'owner/name@revision'.
      left_out: patterns of files that are not fetched.

    Raises:
      FileNotFoundError: which of the things that can be wrong it is, and the remedy, in one sentence.
    """
    if not (match := _ID.fullmatch(source)):
        raise FileNotFoundError(
            f"{source!r} is no id of the Hugging Face hub; write owner/name or owner/name@revision."
        )
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=list(patterns), ignore_patterns=list(left_out)
        )
    # Whatever went wrong between here and the hub has a sentence.
    except Exception as error:
        raise FileNotFoundError(_sentence(match["name"], match["revision"], error)) from error
    folder = Path(found)
    if not folder.is_dir():  # where no file fits the patterns it is not made
        raise FileNotFoundError(
            f"The hub's repository {source} holds no model in a layout that is read here; check the id."
        )
    return folder


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _sentence(name: str, revision: str | None, error: Exception) -> str:
    """What is wrong and what to do. A hub says 'not found' of private models too, to those who may not see them."""
    import huggingface_hub
    from huggingface_hub import errors

    def is_one(kind: type) -> bool:
        return any(isinstance(e, kind) for e in _chain(error))

    page, logged_in = f"{huggingface_hub.constants.ENDPOINT}/{name}", huggingface_hub.get_token() is not None
    response = next((e.response for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)), None)
    status = None if response is None else response.status_code
    said = "" if response is None else response.headers.get("X-Error-Message") or ""
    if status == 401 and "invalid" in said.lower():
        return f"The hub does not accept your token, and so gives no {name}; run `hf auth login` again, or correct or unset HF_TOKEN."
    if is_one(errors.GatedRepoError):
        then = (
            "wait where its authors have to agree, and let your token read gated repositories"
            if logged_in
            else "then run `hf auth login`"
        )
        return (
            f"The model {name} is gated and you have no access; accept its licence at {page} with your account, {then}."
        )
    if is_one(errors.RevisionNotFoundError):
        return f"The model {name} has no revision {revision or 'main'!r}; look at {page}/tree/main for its branches, tags and commits."
    if is_one(errors.RepositoryNotFoundError):
        who = "to the account of your token" if logged_in else "to those who are not logged in"
        remedy = "let that account see it" if logged_in else "run `hf auth login`"
        return f"There is no folder {name}, and the hub shows no model of that id {who}{closest(name, KNOWN)}; correct the name, or, if it is private, {remedy}."
    if is_one(errors.OfflineModeIsEnabled):
        return (
            f"The model {name} is not, or not whole, in the cache {huggingface_hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            "to fetch it; unset HF_HUB_OFFLINE once, or set HF_HOME to where it is."
        )
    if status in (401, 403):
        return f"The hub refuses {name} to your token ({said or status}); let the token read that repository, then try again."
    if status is not None:
        return f"The hub answered with error {status} when asked for {name} ({said or 'no reason given'}); try again later."
    reason = next((line for e in reversed(list(_chain(error))) if (line := str(e).strip())), type(error).__name__)
    return (
        f"The hub at {huggingface_hub.constants.ENDPOINT} cannot be reached for {name}, which is no folder here and not in the cache "
        f"({reason.splitlines()[0]}); try again with a connection, whole files are kept, or pass a folder that holds the model."
    )
