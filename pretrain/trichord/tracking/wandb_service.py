"""The process that W&B starts beside ours, which talks to the server."""

from __future__ import annotations

import threading
from contextlib import suppress

_NAME = "wandb-core"


def end_service() -> None:
    """End it, and let W&B forget it: with something left to send to a server that is gone it would go on for hours,
    W&B would wait for it when this process ends, and a run that could not be opened would stay in use."""
    import psutil  # a login node, which reads records too, may lack it

    _hush_wandb_threads()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == _NAME:
                child.kill()
                child.wait(5)
    # Whatever W&B says of a process that is dead (it may exit with that one's code), or a package that is not there.
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def service_is_gone(error: Exception) -> bool:
    """Whether W&B says that the process it had started is no more. Its types for that are no part of its interface."""
    return type(error).__name__ == "MailboxClosedError" or isinstance(error, ConnectionError)


def _hush_wandb_threads() -> None:
    """Its threads raise errors of their own when the process is gone; nobody else's are hidden."""
    shown = threading.excepthook
    if getattr(shown, "hushes_wandb", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not args.exc_type.__module__.startswith("wandb."):
            shown(args)

    hook.hushes_wandb = True  # pyright: ignore[reportFunctionMemberAccess]
    threading.excepthook = hook
