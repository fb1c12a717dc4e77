"""State of the server process, which decides whether requests are accepted."""

from dataclasses import dataclass, field


@dataclass
class ServerState:
    """Shared by the layers, the probes and the life cycle.

    Attributes:
        is_warm: the engine has generated a token.
        is_draining: the server is stopping.
        is_dead: the engine has died.
        generating: open requests that use the engine.
        drain_timeout: seconds that open requests have once draining begins.
        refusals: requests refused so far, by reason.
    """

    is_warm: bool = False
    is_draining: bool = False
    is_dead: bool = False
    generating: int = 0
    drain_timeout: float = 30.0
    refusals: dict[str, int] = field(default_factory=lambda: {"queue_full": 0, "draining": 0, "engine_dead": 0})

    @property
    def is_ready(self) -> bool:
        return self.is_warm and not self.is_draining and not self.is_dead
