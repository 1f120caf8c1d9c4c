"""A finished model to the Hub: one atomic commit, retried where that is safe, private unless asked otherwise.

``create_commit`` sends the files first and then makes one commit of them; ``upload_folder`` would make several. What the Hub
already has is not sent again. The token is huggingface_hub's own (``hf auth login``, ``HF_TOKEN``) and never seen here.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from finllm_prune.checkpoints.manifest import FOR_PEOPLE, MANIFEST
from finllm_prune.errors import HubError, InputError
from finllm_prune.hub.faults import FAULTS, is_passing, remedy, status_of, wait_asked
from finllm_prune.hub.parcel import Parcel, pack

logger = logging.getLogger(__name__)
T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_LONGEST = 120.0  # seconds that a Hub may ask to wait
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


@dataclass(frozen=True)
class Hub:
    """Where a model goes.

    Args:
        repo_id: ``owner/name``; the repository is made where there is none.
        private: whether only its owner sees it; False for everybody.
        revision: the branch, which is made where there is none; None means main.
        create_pr: propose the commit instead of making it.
        tag: a name for this very commit, which must not be taken.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InputError(f"hub.repo_id: '{self.repo_id}' is no Hub id; write it as owner/name") from error
        if "/" not in self.repo_id:
            raise InputError(f"hub.repo_id: '{self.repo_id}' names no owner; write it as owner/name")
        for key in ("revision", "tag"):
            name = getattr(self, key)
            if name is not None and (not _REF.fullmatch(name) or ".." in name or name.endswith(("/", ".", ".lock"))):
                raise InputError(
                    f"hub.{key}: '{name}' is no name of a branch or tag; use letters, digits, dashes and dots"
                )
        if self.create_pr and (self.revision or self.tag):
            raise InputError("hub.create_pr: a proposal is made to main and has no tag; remove revision and tag")


@dataclass(frozen=True)
class Pushed:
    """What came of it.

    Args:
        url: of the commit, or of the proposal.
        commit: its hash.
        new: False where all of it was there already.
        places: format -> its folder in the repository, "" for the root.
    """

    url: str
    commit: str
    new: bool
    places: dict[str, str]


def refuse_no_token(hub: Hub) -> None:
    """Raise InputError where huggingface_hub knows no token: a run should not find that out at its end."""
    if not get_token():
        raise InputError(
            f"hub: there is no token to push to {hub.repo_id} with; log in with `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, hub: Hub, formats: Sequence[str] = (), *, allow_failed_gates: bool = False) -> Pushed:
    """Push the output of a run, of an ``export``, or one exported format; for what goes where see ``parcel``.

    Whatever lies in the repository for a loader to read is then of this push; text and pictures that others put there stay.

    Raises:
        InputError, ProofError: as ``parcel.pack``, or there is no token; nothing has been sent then.
        HubError: the Hub cannot be reached or refuses; what it holds is what it held, and the folder is whole.
    """
    refuse_no_token(hub)
    parcel = pack(folder, hub.repo_id, formats, allow_failed_gates=allow_failed_gates)
    api = HfApi()
    try:
        before = _ready(api, hub)
        commit = _patiently(lambda: _commit(api, hub, parcel), only_refused=hub.create_pr)
    except InputError:
        raise
    except FAULTS as error:
        raise HubError(f"{remedy(error, hub.repo_id)} (nothing changed there, and {folder} is whole)") from error
    if hub.tag is not None:
        tag = hub.tag
        try:
            _patiently(lambda: api.create_tag(hub.repo_id, tag=tag, revision=commit.oid, exist_ok=True))
        except FAULTS as error:
            raise HubError(
                f"{remedy(error, hub.repo_id)} (the commit {commit.oid} is there, without its tag)"
            ) from error
    return Pushed(commit.pr_url or commit.commit_url, commit.oid, commit.oid != before, parcel.places)


def push_output(folder: Path, hub: Hub) -> Pushed:
    """At the end of a run, all of which is written: whatever stops the push is a HubError with the command for later."""
    try:
        return push(folder, hub)
    except (InputError, HubError) as error:
        later = f"finllm-prune push {folder} {hub.repo_id}" + "".join(
            f" --{key} {value}" for key, value in (("revision", hub.revision), ("tag", hub.tag)) if value is not None
        )
        later += " --create-pr" * hub.create_pr + " --public" * (not hub.private)
        raise HubError(f"{error}; everything is written to {folder}, later push it with: {later}") from error


def _ready(api: HfApi, hub: Hub) -> str | None:
    """Make repository and branch where there are none; returns the branch's last commit."""
    _patiently(lambda: api.create_repo(hub.repo_id, private=hub.private, exist_ok=True))
    refs = _patiently(lambda: api.list_repo_refs(hub.repo_id))
    if hub.tag in {ref.name for ref in refs.tags}:
        raise InputError(f"hub.tag: {hub.repo_id} has a tag {hub.tag} already; name another, as tags do not move")
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    branch = hub.revision or "main"
    if branch not in branches and hub.revision is not None:
        # From the first, empty commit: until ours is there, nobody gets the model of main by this name.
        first = _patiently(lambda: api.list_repo_commits(hub.repo_id))[-1].commit_id
        _patiently(lambda: api.create_branch(hub.repo_id, branch=branch, revision=first, exist_ok=True))
        return first
    return branches.get(branch)


def _commit(api: HfApi, hub: Hub, parcel: Parcel) -> CommitInfo:
    """One try, from what is there now: where an answer was lost, the next try finds its own commit."""
    info = api.model_info(hub.repo_id, revision=hub.revision)
    if hub.private and not info.private:
        raise InputError(
            f"{hub.repo_id} is public; make it private on the Hub first, or push with --public (private: false)"
        )
    there = [file.rfilename for file in info.siblings or []]
    read = [path for path in there if PurePosixPath(path).suffix not in FOR_PEOPLE]
    if read and MANIFEST not in there:
        raise InputError(f"{hub.repo_id} holds {read[0]}, which finllm-prune did not push; name another repository")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, content) for path, content in parcel.files.items()
    ]
    operations += [CommitOperationDelete(path) for path in read if path not in parcel.files]
    return api.create_commit(
        hub.repo_id, operations, commit_message=f"finllm-prune: {', '.join(parcel.places)}", revision=hub.revision,
        create_pr=hub.create_pr, parent_commit=info.sha,
    )  # fmt: skip


def _patiently(act: Callable[[], T], only_refused: bool = False) -> T:
    """Try again after faults that pass. huggingface_hub does so for uploads, but not for the calls around them.

    ``only_refused``: not where the answer alone may have been lost, for a second proposal would be another one.
    """
    for wait in WAITS:
        try:
            return act()
        except InputError:
            raise
        except FAULTS as error:
            asked = wait_asked(error)
            if isinstance(error, RuntimeError):  # of a file, which huggingface_hub itself has tried six times
                raise
            if not is_passing(error) or (only_refused and status_of(error) != 429) or (asked or 0.0) > _LONGEST:
                raise
            logger.info(
                "The Hub did not answer well (%s); again in %g s.", status_of(error) or "cut off", asked or wait
            )
            time.sleep(asked or wait)
    return act()
