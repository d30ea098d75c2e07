"""What training wraps around a model, and so around the names of its parameters: DDP, torch.compile, FSDP."""

from merging.checkpoints import Checkpoint
from merging.checkpoints.views import renamed

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # never the name of a model's own part
AROUND = "module."  # of DataParallel and the like: stripped only where all names have it
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which has `module.` around the rest


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names of the bare model, and a remark on what was stripped; itself if nothing was.

    Raises UserError where two parameters then have one name.
    """
    names = {key: _bare(key) for key in checkpoint.specs()}
    stripped = [f"{part}." for part in ANYWHERE if any(part in key.split(".") for key in names)]
    rest = [key for key in names if key != COUNTER]
    while rest and all(names[key].startswith(AROUND) for key in rest):
        names = {key: names[key].removeprefix(AROUND) for key in rest}
        stripped.append(AROUND)
    if not stripped:
        return checkpoint
    return renamed(checkpoint, names, (f"names without {' and '.join(dict.fromkeys(stripped))}",))


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ANYWHERE)
