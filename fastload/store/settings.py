"""The settings of stores beside endpoint and keys: under which names they are passed on, whose they are, and which
variables stand for them.

The client library reads these variables too, from the environment that it finds itself in, so the list must have all
that it reads: what is named here is resolved by the consumer, and what is found elsewhere is refused (`foreign`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

S3 = {
    "virtual_hosted_style_request": ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST",),
    "request_payer": ("AWS_REQUEST_PAYER",),
    "s3_express": ("AWS_S3_EXPRESS",),
    "sse_customer_key_base64": ("AWS_SSE_CUSTOMER_KEY_BASE64",),
    "server_side_encryption": ("AWS_SERVER_SIDE_ENCRYPTION",),
    "role_arn": ("AWS_ROLE_ARN",),
    "role_session_name": ("AWS_ROLE_SESSION_NAME",),
    "web_identity_token_file": ("AWS_WEB_IDENTITY_TOKEN_FILE",),
    "sts_endpoint": ("AWS_ENDPOINT_URL_STS", "AWS_STS_ENDPOINT"),
    "container_credentials_relative_uri": ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
    "container_credentials_full_uri": ("AWS_CONTAINER_CREDENTIALS_FULL_URI",),
    "container_authorization_token_file": ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",),
    "metadata_endpoint": ("AWS_METADATA_ENDPOINT", "AWS_EC2_METADATA_SERVICE_ENDPOINT"),
    "metadata_disabled": ("AWS_EC2_METADATA_DISABLED",),
    "imdsv1_fallback": ("AWS_IMDSV1_FALLBACK",),
}
GOOGLE = {
    "service_account": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
    "service_account_path": (),
    "service_account_key": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
    "application_credentials": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "google_bearer_token": ("GOOGLE_BEARER_TOKEN",),
    "google_base_url": ("GOOGLE_BASE_URL",),
    "google_skip_signature": ("GOOGLE_SKIP_SIGNATURE",),
}
AZURE = {
    "account_name": ("AZURE_STORAGE_ACCOUNT_NAME",),
    "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
    "sas_key": ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN"),
    "azure_storage_token": ("AZURE_STORAGE_TOKEN",),
    "client_id": ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
    "client_secret": ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET"),
    "tenant_id": (
        "AZURE_STORAGE_TENANT_ID",
        "AZURE_STORAGE_AUTHORITY_ID",
        "AZURE_TENANT_ID",
        "AZURE_AUTHORITY_ID",
    ),
    "authority_host": ("AZURE_STORAGE_AUTHORITY_HOST", "AZURE_AUTHORITY_HOST"),
    "federated_token_file": ("AZURE_FEDERATED_TOKEN_FILE",),
    "msi_endpoint": ("AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT", "IDENTITY_ENDPOINT"),
    "object_id": ("AZURE_OBJECT_ID",),
    "msi_resource_id": ("AZURE_MSI_RESOURCE_ID",),
    "use_azure_cli": ("AZURE_USE_AZURE_CLI",),
    "credential_type": ("AZURE_CREDENTIAL_TYPE",),
    "azure_endpoint": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "azure_skip_signature": ("AZURE_SKIP_SIGNATURE",),
    "use_emulator": ("AZURE_STORAGE_USE_EMULATOR",),
    "use_fabric_endpoint": ("AZURE_USE_FABRIC_ENDPOINT",),
    "fabric_token_service_url": ("AZURE_FABRIC_TOKEN_SERVICE_URL",),
    "fabric_workload_host": ("AZURE_FABRIC_WORKLOAD_HOST",),
    "fabric_session_token": ("AZURE_FABRIC_SESSION_TOKEN",),
    "fabric_cluster_identifier": ("AZURE_FABRIC_CLUSTER_IDENTIFIER",),
    "encryption_key": ("AZURE_ENCRYPTION_KEY", "AZURE_STORAGE_ENCRYPTION_KEY"),
}
# Those that are paths, which the service finds from another working directory.
FILES = frozenset(
    {
        "web_identity_token_file",
        "container_authorization_token_file",
        "service_account",
        "service_account_path",
        "application_credentials",
        "federated_token_file",
    }
)
# The HTTP client's, for every provider.
CLIENT = frozenset(
    {
        "allow_invalid_certificates",
        "connect_timeout",
        "read_timeout",
        "timeout",
        "proxy_url",
        "root_certificate",
        "user_agent",
    }
)
# Proxies as the variables of those names (in small letters or capitals) have them: which one counts depends on the URL.
PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})
# Settings of file systems of fsspec, as JSON: {protocol or "*": {name: value}}.
FSSPEC = "fsspec"
# Logins that stood in URLs, as JSON: {root of a store: "user:password"}.
LOGINS = "logins"

_BY_SCHEME = {"s3": S3, "s3a": S3, "gs": GOOGLE} | dict.fromkeys(("az", "adl", "azure", "abfs", "abfss"), AZURE)
_ALL = (S3, GOOGLE, AZURE)

PASSED_ON = frozenset().union(*_ALL) | CLIENT

# Ways to credentials. Those of a provider come whole from one place: a secret from one and a name from another would be
# refused by the store with a message that does not help.
S3_WAYS = frozenset(
    {
        "role_arn",
        "role_session_name",
        "web_identity_token_file",
        "container_credentials_relative_uri",
        "container_credentials_full_uri",
        "container_authorization_token_file",
    }
)
# Those, and what else says how credentials are found out.
S3_FINDING = S3_WAYS | {"sts_endpoint", "metadata_endpoint", "metadata_disabled", "imdsv1_fallback"}
GOOGLE_WAYS = frozenset(
    {
        "service_account",
        "service_account_path",
        "service_account_key",
        "application_credentials",
        "google_bearer_token",
    }
)
AZURE_WAYS = frozenset(
    {
        "account_key",
        "sas_key",
        "azure_storage_token",
        "client_id",
        "client_secret",
        "tenant_id",
        "federated_token_file",
        "msi_endpoint",
        "object_id",
        "msi_resource_id",
        "use_azure_cli",
        "credential_type",
        "fabric_session_token",
    }
)

_AWS_KEYS = {
    "access_key_id": ("AWS_ACCESS_KEY_ID",),
    "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN", "AWS_TOKEN"),
}
# What is said of a bucket of S3 in any case (see `objectstore`), so that no variable counts.
_ALWAYS_SAID = frozenset({"virtual_hosted_style_request", "request_payer", "s3_express", "metadata_disabled"})


def of_scheme(kind: str, settings: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Those of the settings that say something of stores of this scheme: no others are passed to its provider."""
    names = _BY_SCHEME.get(kind, {LOGINS: ()}).keys() | CLIENT | PROXIES
    return {name: value for name, value in settings if name in names}


def of_variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the variables say: (value, variable) by setting."""
    found: dict[str, tuple[str, str]] = {}
    for table in _ALL:
        for setting, variables in table.items():
            variable = next((name for name in variables if environ.get(name)), None)
            if variable is not None:
                found[setting] = environ[variable], variable
    return found


def foreign(kind: str, settings: Mapping[str, str], environ: Mapping[str, str], *, has_keys: bool) -> list[str]:
    """The variables of `environ` that the client library would take for a store of this scheme although its settings
    say something else, or nothing. `has_keys`: the S3 credentials are settled.
    """
    table = _BY_SCHEME[kind]
    if table is S3:
        ways = {} if has_keys else _AWS_KEYS
        table = ways | {
            name: variables
            for name, variables in S3.items()
            if name not in _ALWAYS_SAID and not (has_keys and name in S3_FINDING)
        }
    return [
        variable
        for setting, variables in table.items()
        for variable in variables
        if environ.get(variable) and environ[variable] != settings.get(setting)
    ]
