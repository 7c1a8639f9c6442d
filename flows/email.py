"""Prefect's notification block for plain e-mail, which Prefect itself lacks. The server finds it by its entry point."""

from __future__ import annotations

from prefect.blocks.notifications import AppriseNotificationBlock
from pydantic import Field, SecretStr


class Email(AppriseNotificationBlock):
    """Sends notifications by e-mail through an SMTP server."""

    _block_type_name = "E-mail (leukoflow)"
    _block_type_slug = "leukoflow-email"
    _logo_url = None

    url: SecretStr = Field(
        title="Address of the SMTP server",
        description="mailto:// (plain) or mailtos:// (TLS), with sender and receivers",
        examples=["mailtos://USER:PASSWORD@smtp.example.org:587?from=night@example.org&to=lab@example.org"],
    )
