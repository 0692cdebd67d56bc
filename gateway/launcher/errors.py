"""The launcher's errors: one tree, each class a line on when it is raised."""

from __future__ import annotations


class LauncherError(Exception):
    """Root of everything the launcher raises itself."""


class RefusedError(LauncherError):
    """Serving would be unsafe: a layer cannot be applied. The text says which, and where possible the command that cures it."""


class UnknownInstanceError(LauncherError):
    """No unexpired instance of that id."""


class InstanceExistsError(LauncherError):
    """An instance was to be made with an id that is already in use."""


class StorageLowError(LauncherError):
    """The host's disk has too little room for one more instance."""


class HostFullError(LauncherError):
    """The host has as many live instances as it may."""


class OwnerFullError(LauncherError):
    """The owner has as many live instances as one may. `until` is the unix second at which the first of them ends."""

    def __init__(self, reason: str, *, until: int) -> None:
        super().__init__(reason)
        self.until = until


class QuotaError(LauncherError):
    """The instance has had as many runs as one may."""


class RepeatedError(LauncherError):
    """A run that must not be had twice was begun before."""


class ExtendingOffError(LauncherError):
    """No life is extended here."""


class UnfitVolumeError(LauncherError):
    """A volume holds something that no runner can have left there."""


class BusyError(LauncherError):
    """A lease or a slot was not free in time."""


class EngineError(LauncherError):
    """Root of what a container engine raises."""


class EngineDownError(EngineError):
    """The engine does not answer. `nothing_sent` is true when the order certainly never reached it."""

    def __init__(self, reason: str, *, nothing_sent: bool = False) -> None:
        super().__init__(reason)
        self.nothing_sent = nothing_sent


class ImageMissingError(EngineError):
    """The engine has no such image."""


class ContainerRefusedError(EngineError):
    """The engine answered, but did not give the container that was asked for."""


class DeadContainerError(EngineError):
    """A container that was started ahead had ended before a byte of the request reached it."""
