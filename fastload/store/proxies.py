"""Which proxy stands before a server, by the variables that every tool reads.

`https_proxy`, `http_proxy` and `all_proxy` name it, in small letters or capitals, and `no_proxy` names who is reached
without: hosts, ends of hosts, or networks as 10.0.0.0/8. obstore reads the same variables by itself, and what it lists
must be read the same way.
"""

from __future__ import annotations

import base64
import ipaddress
import urllib.parse
import urllib.request
from dataclasses import dataclass

from fastload.errors import ConfigError


@dataclass(frozen=True, slots=True, repr=False)
class Proxy:
    """Where a proxy is. Its repr would show a password."""

    scheme: str
    host: str
    port: int | None
    authorization: str | None = None

    @property
    def is_http(self) -> bool:
        """Whether it is spoken to in plain HTTP, which is all that HttpReader can."""
        return self.scheme == "http"

    @property
    def headers(self) -> dict[str, str]:
        """What it is sent besides the request."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}

    @classmethod
    def parse(cls, text: str, source: str) -> Proxy:
        """The proxy at `text`, as `source` (a variable or setting) gives it; ConfigError where it is no address."""
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host:
            raise ConfigError(f"{source} names no proxy; write it as http://host:port, or unset it")
        authorization = None
        if parts.username is not None:
            names = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            authorization = f"Basic {base64.b64encode(':'.join(names).encode()).decode()}"
        return cls(parts.scheme, host, port, authorization)


def proxy_for(base_url: str, proxy_url: str | None = None) -> Proxy | None:
    """The proxy before the server at `base_url`: `proxy_url`, or else what the environment says; None for none."""
    if proxy_url is not None:
        return Proxy.parse(proxy_url, "proxy_url")
    parts = urllib.parse.urlsplit(base_url)
    proxies = urllib.request.getproxies()
    name = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if name is None or _goes_without(parts.hostname or "", proxies.get("no", "")):
        return None
    return Proxy.parse(proxies[name], f"{name}_proxy")


def _goes_without(host: str, no_proxy: str) -> bool:
    if urllib.request.proxy_bypass(host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for name in no_proxy.split(","):
        try:
            if address in ipaddress.ip_network(name.strip(), strict=False):
                return True
        except ValueError:  # a name, and seen to above
            continue
    return False
