"""Which proxy stands before a server, by the variables that every tool reads.

`https_proxy`, `http_proxy` and `all_proxy` name it, in small letters or capitals, and `no_proxy` names who is reached
without: hosts, ends of hosts, or networks as 10.0.0.0/8. They come with the store's settings, as the consumer found
them. obstore, which would read them from its own process's environment, is given the proxy explicitly.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from fastload.errors import ConfigError
from fastload.store.logins import authorization


@dataclass(frozen=True, slots=True, repr=False)
class Proxy:
    """Where a proxy is. Its repr would show a password."""

    scheme: str
    host: str
    port: int | None
    url: str
    authorization: str | None = None

    @property
    def is_http(self) -> bool:
        """Whether it is spoken to in plain HTTP, which is all that HttpClient can."""
        return self.scheme == "http"

    @property
    def headers(self) -> dict[str, str]:
        """What it is sent besides the request."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}

    @classmethod
    def parse(cls, text: str, source: str) -> Proxy:
        """The proxy at `text`, as `source` (a variable or setting) gives it; ConfigError where it is no address."""
        url = text if "://" in text else f"http://{text}"
        parts = urllib.parse.urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host:
            raise ConfigError(f"{source} is not the address of a proxy; write it as http://host:port, or unset it")
        login = parts.netloc.rpartition("@")[0]
        return cls(parts.scheme, host, port, url, authorization(login) if login else None)


# Who hands out credentials on this machine is on no network that a proxy leads to.
_MACHINE = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "metadata.google.internal", "metadata")


def proxy_for(base_url: str, settings: Mapping[str, str]) -> Proxy | None:
    """The proxy before the server at `base_url`: `proxy_url`, or else what the variables say; None for none."""
    if "proxy_url" in settings:
        return Proxy.parse(settings["proxy_url"], "proxy_url")
    parts = urllib.parse.urlsplit(base_url)
    name = next((name for name in (f"{parts.scheme}_proxy", "all_proxy") if settings.get(name)), None)
    if name is None or _goes_without(parts.hostname or "", settings.get("no_proxy", "")):
        return None
    return Proxy.parse(settings[name], name)


def for_obstore(proxy: Proxy | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Client options by which obstore uses that proxy, or none, regardless of its process's environment."""
    if proxy is None:
        return {"proxy_url": "http://127.0.0.1:9", "proxy_excludes": "*,0.0.0.0/0,::/0"}
    machine = (*_MACHINE, urllib.parse.urlsplit(settings.get("metadata_endpoint", "")).hostname or "")
    spared = (*machine, "" if "proxy_url" in settings else settings.get("no_proxy", ""))
    return {"proxy_url": proxy.url, "proxy_excludes": ",".join(filter(None, spared))}


def _goes_without(host: str, no_proxy: str) -> bool:
    if urllib.request.proxy_bypass_environment(host, {"no": no_proxy}):  # type: ignore[attr-defined]
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
