"""Keys and passwords that stand in a file. What is found is never printed."""

from __future__ import annotations

import re

from gpt2dist.cluster.check.document import Document

# Forms that the issuers document, or that secret scanners look for.
FORMS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}\b",
    "an Azure storage key": r"\bAccountKey=[A-Za-z0-9+/=]{40,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in a URL": r"://[^/\s:@'\"$]+:[^/\s:@'\"$]+@",
}
NAMES = r"[A-Za-z0-9_]*(?:SECRET|PASSWORD|PASSWD|TOKEN|API_?KEY|ACCESS_?KEY(?:_ID)?|PRIVATE_?KEY|CREDENTIALS?)"
SECRET_NAME = re.compile(rf"{NAMES}$", re.I)
# NAME=value in a command or an option, name: value in YAML; not $NAME, a path, or the name of something.
ASSIGNED = re.compile(rf"(?<![A-Za-z0-9_]){NAMES}(?:=|:\s+)['\"]?[^\s'\"$~/<{{\[(&*,;]{{8,}}", re.I)
FIX = "take it out and revoke it; use a role (IamInstanceProfile, serviceAccountName), a Secret or a file_mounts entry"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return bool(SECRET_NAME.fullmatch(name))


def check_secrets(document: Document) -> None:
    """Looks at every line, comments too."""
    for number, line in enumerate(document.text, 1):
        found = next((name for name, form in FORMS.items() if re.search(form, line)), None)
        if not found and ASSIGNED.search(re.sub(r"(^|\s)#.*", "", line)):
            found = "a secret"
        if found:
            document.error("secret", document.key_at(number), f"holds {found} (line {number})", FIX)
