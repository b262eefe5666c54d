"""The `tracking` group of the configuration."""

from dataclasses import dataclass
from enum import StrEnum


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class TrackingConfig:
    wandb: WandbMode
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
