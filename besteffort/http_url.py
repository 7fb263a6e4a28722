"""Whether a URL can be asked at all, before anything is started that would ask it."""

from urllib.parse import urlsplit


def is_http_url(url: str) -> bool:
    """`http` or `https`, with a host, and with a port that is a number if there is one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
