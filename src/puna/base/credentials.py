"""Credentials of object stores by the usual chain: the environment, then ~/.aws, then what the machine offers.

No value of a credential ever leaves this file: messages name where one came from, and `clean` takes it out of theirs.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from puna.base.console import PunaError

_CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_IN_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", *_CONTAINER)
CREDENTIALS_HINT = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_SKIP_SIGNATURE=true for public data",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or run `az login`",
}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false")


def credential_options() -> dict[str, Any]:
    """What obstore needs beyond the environment, which it reads itself (keys, web identity, container)."""
    if _is_set("AWS_SKIP_SIGNATURE") or any(map(_is_set, _IN_ENVIRONMENT)):
        return {}
    options = _profile_options()
    if not options and _is_set("AWS_EC2_METADATA_DISABLED"):
        raise PunaError("no AWS credentials in the environment or ~/.aws", CREDENTIALS_HINT["s3"])
    return options


def _profile_options() -> dict[str, Any]:
    """The profile's credentials: through boto3 where it is installed (SSO, assumed roles), else its static keys."""
    files, profile = _profile_files(), os.environ.get("AWS_PROFILE", "")
    if not any(file.exists() for file in files) and not profile:
        return {}
    sections = _read_profile(files, profile or "default")
    if profile and not sections:
        raise PunaError(f"AWS_PROFILE {profile} is in none of {files[0]}, {files[1]}", "correct AWS_PROFILE")
    if importlib.util.find_spec("boto3"):
        return _boto3_options(profile)
    names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
    names |= {"session_token": "aws_session_token", "region": "region"}
    options = {ours: sections[theirs] for ours, theirs in names.items() if theirs in sections}
    if profile and "access_key_id" not in options:
        raise PunaError(f"AWS_PROFILE {profile} holds no keys", "pip install boto3: it logs in by SSO and roles")
    if _is_set("AWS_REGION") or _is_set("AWS_DEFAULT_REGION"):
        options.pop("region", None)
    return options


def _profile_files() -> tuple[Path, Path]:
    credentials = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    return Path(credentials).expanduser(), Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()


def _read_profile(files: tuple[Path, Path], profile: str) -> dict[str, str]:
    sections: dict[str, str] = {}
    for file, name in zip(files, (profile, profile if profile == "default" else f"profile {profile}"), strict=True):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeError):
            # The parser's own message quotes the line, which may be a key.
            raise PunaError(f"{file} is not a readable AWS settings file", "see `aws configure list`") from None
        sections = {**dict(parser[name]), **sections} if parser.has_section(name) else sections
    return sections


def _boto3_options(profile: str) -> dict[str, Any]:
    import boto3
    import botocore.exceptions
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session(profile_name=profile or None)
        # Asked again every 5 minutes: botocore renews what expires 10 minutes ahead.
        provider = Boto3CredentialProvider(session, ttl=timedelta(minutes=5))
        provider.config = {} if _is_set("AWS_REGION") else provider.config
        return {"credential_provider": provider}
    except ValueError:
        return {}  # it found none
    except botocore.exceptions.BotoCoreError as error:
        raise PunaError(f"boto3 has no credentials: {clean(str(error))}", CREDENTIALS_HINT["s3"]) from None


def credential_source(scheme: str) -> str:
    """Where the credentials came from, for a message: names, never values."""
    if scheme != "s3":
        return "with the credentials of this machine"
    if _is_set("AWS_SKIP_SIGNATURE"):
        return "unsigned, AWS_SKIP_SIGNATURE"
    if found := next(filter(_is_set, _IN_ENVIRONMENT), ""):
        return f"credentials from {found}"
    if any(file.exists() for file in _profile_files()):
        return f"profile {os.environ.get('AWS_PROFILE') or 'default'} of {_profile_files()[0].parent}"
    return "none in the environment or ~/.aws, and this machine offers none"


def clean(text: str) -> str:
    """The first line of a library's text without what may be secret: query strings and the values of credentials."""
    line = re.sub(r"\?\S*", "", text.partition("\n")[0])[:200]
    for name, value in os.environ.items():
        if len(value) > 3 and re.search("SECRET|TOKEN|ACCESS_KEY|ACCOUNT_KEY|PASSWORD", name):
            line = line.replace(value, "***")
    return line
