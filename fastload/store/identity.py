"""As whom a store is asked, in words: which kind of credentials, and where they were found. Never their values."""

from __future__ import annotations

from fastload.store.environment import as_bool
from fastload.store.options import StoreOptions

_GOOGLE = {
    "google_bearer_token": "the token",
    "service_account_key": "the service account's key",
    "service_account": "the service account's file",
    "service_account_path": "the service account's file",
    "application_credentials": "the application default credentials",
}
# In the order in which the client library prefers them.
_AZURE = {
    "azure_storage_token": "the token",
    "account_key": "the account's key",
    "federated_token_file": "the workload's identity",
    "client_secret": "the client's secret",
    "sas_key": "the shared access signature",
    "use_azure_cli": "what the Azure CLI is logged in as",
}


def credentials_of(kind: str, options: StoreOptions) -> str:
    """With what requests to a store of this scheme are signed: "the keys from AWS_ACCESS_KEY_ID"."""
    said, sources = dict(options.extra), dict(options.sources)

    def source(name: str) -> str:
        return sources.get(name, "storage_options")

    unsigned = ["google_skip_signature"] if kind == "gs" else ["azure_skip_signature"]
    if options.anonymous or any(as_bool(said.get(name)) for name in unsigned):
        return f"no signature, as {source('anonymous' if options.anonymous else unsigned[0])} says"
    if kind in ("s3", "s3a"):
        return _of_s3(options, said, source("access_key_id"), sources)
    kinds = _GOOGLE if kind == "gs" else _AZURE
    found = next((name for name in kinds if name in said), None)
    if found is not None:
        return f"{kinds[found]} from {source(found)}"
    names = "GOOGLE_* nor gcloud's file" if kind == "gs" else "AZURE_*"
    return f"this machine's identity, since neither storage_options nor {names} names another"


def _of_s3(options: StoreOptions, said: dict[str, str], source: str, sources: dict[str, str]) -> str:
    if options.access_key_id is not None:
        return f"the keys{' and the session token' if options.session_token else ''} from {source}"
    if {"role_arn", "web_identity_token_file"} <= said.keys():
        return f"the web identity of {sources.get('web_identity_token_file', 'storage_options')}"
    for name in ("container_credentials_relative_uri", "container_credentials_full_uri"):
        if name in said:
            return f"the container's role, from {sources.get(name, 'storage_options')}"
    profile = sources.get("profile", "a profile")
    return f"this machine's role, since no keys are in storage_options, AWS_ACCESS_KEY_ID or {profile}"
