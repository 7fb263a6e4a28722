"""What whoever starts the router may choose."""

import ssl
from dataclasses import dataclass, field

from besteffort.router.api_key import ApiKey
from besteffort.router.limits import Limits


@dataclass(frozen=True)
class Settings:
    limits: Limits = field(default_factory=Limits)
    api_key: ApiKey | None = None
    protect_metrics: bool = False
    forward_authorization: bool = False
    tls: ssl.SSLContext | None = None
    admin_key: ApiKey | None = None  # None: there is no administration
