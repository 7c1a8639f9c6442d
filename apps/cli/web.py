"""Commands of the web application: serve it, and say who may come in."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leukoflow.apps.cli.common import Commands, Debug, Out, existing, refuse_remote, reported
from leukoflow.core.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from leukoflow.apps.web.gate.accounts import Accounts
    from leukoflow.apps.web.settings import WebSettings

users_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Users of the web application and their passwords, and tokens for programs.\n\n"
    "All in one file that only its owner can read, outside the results: `--users`, else `LEUKOFLOW_WEB_USERS`, else "
    "below the user's state directory. A running server notices changes immediately.\n\n"
    "**Example**: `leukoflow users add anna --role reviewer`",
)
UsersFile = Annotated[Path | None, typer.Option("--users", metavar="FILE", help="The users file.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="NAME")]
FromInput = Annotated[
    bool, typer.Option("--password-stdin", help="Take the password from the standard input instead of asking.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(serve)
    app.add_typer(users_app, name="users")


def serve(
    out: Out,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 is any free one.")] = 8400,
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", help="Bundle for single images; may be repeated, the first is used unless chosen."),
    ] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose/--no-diagnose", help="Whether users may classify single images.")
    ] = True,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that classify single images.")] = 1,
    users: UsersFile = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="HOST", envvar="LEUKOFLOW_WEB_NAMES", help="Host name that people type; may be repeated."
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option("--root-path", help="Path below which a reverse proxy serves this, as in /leukoflow.")
    ] = "",
    proxy_from: Annotated[
        list[str] | None,
        typer.Option(
            "--proxy-from",
            metavar="ADDRESS",
            envvar="LEUKOFLOW_WEB_PROXIES",
            help="Address or network of the reverse proxy, trusted to name client and scheme; repeatable.",
        ),
    ] = None,
    proxy_sign_in: Annotated[
        bool,
        typer.Option("--proxy-sign-in", help="That proxy signs users in (OIDC) and names them in headers."),
    ] = False,
    proxy_name_header: Annotated[
        str, typer.Option("--proxy-name-header", help="Header with the person's name.")
    ] = "X-Forwarded-User",
    proxy_groups_header: Annotated[
        str, typer.Option("--proxy-groups-header", help="Header with their groups, separated by commas.")
    ] = "X-Forwarded-Groups",
    proxy_role: Annotated[
        list[str] | None,
        typer.Option("--proxy-role", metavar="GROUP=ROLE", help="viewer, reviewer or admin of a group; repeatable."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key, PEM.")] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow an address other than loopback without TLS.")
    ] = False,
    idle_minutes: Annotated[
        float, typer.Option("--idle-minutes", min=1, help="Minutes without a request after which a session ends.")
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve the web application: the morning's worklist, and diagnosis of single images.

    Listens on this machine only, unless `--host` is given. The first start prints a link that creates the first
    administrator; add others with `leukoflow users`. Passwords never cross the network in clear: another address needs
    `--tls-cert`, or a reverse proxy named with `--proxy-from`. Research use only.

    **Examples**: `leukoflow serve out`; `leukoflow serve s3://results --host 0.0.0.0 --name smears.lab --tls-cert c.pem
    --tls-key k.pem`
    """
    with reported(debug):
        import asyncio
        from dataclasses import replace

        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.web.settings import (
            ProxySettings,
            WebSettings,
            checked_host_name,
            checked_root_path,
            checked_users_file,
            is_loopback,
            networks,
        )

        refuse_remote(**{"--users": users, "--tls-cert": tls_cert, "--tls-key": tls_key})
        if (tls_cert is None) != (tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together")
        for file in filter(None, (tls_cert, tls_key)):
            if not file.is_file():
                raise ConfigError(f"{file} does not exist")
        trusted = networks(tuple(proxy_from or ()))
        if not (is_loopback(host) or tls_cert or trusted or plain_http):
            raise ConfigError(
                f"--host {host}: passwords would cross the network in the clear; give --tls-cert and --tls-key, or put "
                "a reverse proxy in front and name it with --proxy-from (--plain-http allows it all the same)"
            )
        if proxy_sign_in and not trusted:
            raise ConfigError("--proxy-sign-in: name the proxy with --proxy-from, or anybody could claim to be anyone")
        settings = WebSettings(
            out=existing(out),
            users_file=checked_users_file(users, out),
            host=host,
            port=port,
            bundles=tuple(bundle or ("pocket",)) if diagnose else (),
            names=tuple(checked_host_name(n) for n in name or ()),
            root_path=checked_root_path(root_path),
            tls=tls_cert is not None,
            proxy=ProxySettings(
                trusted, proxy_sign_in, proxy_name_header.lower(), proxy_groups_header.lower(), _roles(proxy_role or [])
            ),
            idle_minutes=idle_minutes,
            workers=workers,
        )
        with _listen(host, port) as listening:
            settings = replace(settings, port=listening.getsockname()[1])
            with suppress(KeyboardInterrupt):
                asyncio.run(_serve(settings, listening, tls_cert, tls_key, open_console().print))


async def _serve(
    settings: WebSettings, listening: socket.socket, tls_cert: Path | None, tls_key: Path | None, say: object
) -> None:
    import logging

    import uvicorn

    from leukoflow.apps.web.app import create_app

    assert callable(say)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app = create_app(settings)
    app.state.gate.trail.add("-", "server started")  # and so looks through the log, before anybody comes in
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would write whole paths; the guard writes those of the routes
        proxy_headers=False,  # the guard decides whose word counts
        server_header=False,
        ws="none",
        timeout_keep_alive=20,
        timeout_graceful_shutdown=15,
        limit_concurrency=400,
        h11_max_incomplete_event_size=32 << 10,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    scheme = "https" if settings.tls else "http"
    shown = settings.names[0] if settings.names else settings.host
    shown = f"[{shown}]" if ":" in shown else shown
    say(f"leukoflow  {scheme}://{shown}:{settings.port}{settings.root_path}/", soft_wrap=True)
    if link := app.state.gate.setup_link():
        say(
            "There are no users yet. Create the first administrator by opening this on this machine within an hour:",
            soft_wrap=True,
        )
        say(f"  {link}", soft_wrap=True, markup=False, highlight=False)
    await uvicorn.Server(config).serve(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another with --host and --port"
        ) from None


def _roles(pairs: list[str]) -> tuple[tuple[str, str], ...]:
    from leukoflow.apps.web.settings import ROLES

    found = []
    for pair in pairs:
        group, _, role = pair.rpartition("=")
        if not group or role not in ROLES:
            raise ConfigError(f"--proxy-role {pair}: it must look like GROUP=ROLE, with a role of {', '.join(ROLES)}")
        found.append((group, role))
    return tuple(found)


# --- users -----------------------------------------------------------------------------------------------------------


@users_app.command("add")
def users_add(
    name: Name,
    role: Annotated[str, typer.Option("--role", help="viewer, reviewer or admin.")] = "viewer",
    users: UsersFile = None,
    password_stdin: FromInput = False,
    debug: Debug = False,
) -> None:
    """Add a user; asks for the password twice.

    A viewer can look at results and classify single images; a reviewer can also record verdicts and export; an admin
    can also manage users.

    **Example**: `leukoflow users add anna --role reviewer`
    """
    with reported(debug):
        accounts = _accounts(users)
        accounts.check_new(name, role)  # before anybody types a password
        accounts.add(name, role, _password(password_stdin))
        typer.echo(f"{name} can now sign in as {role}")


@users_app.command("list")
def users_list(users: UsersFile = None, debug: Debug = False) -> None:
    """List users and tokens; neither passwords nor tokens are shown."""
    with reported(debug):
        accounts = _accounts(users)
        book = accounts.book()
        if not book.users:
            typer.echo(f"no users yet in {accounts.path}; `leukoflow users add NAME --role admin` adds the first")
        for user in book.users:
            typer.echo(f"{user.name:24} {user.role:10} {'disabled' if user.disabled else ''}".rstrip())
        for token in book.tokens:
            scopes = " ".join(token.scopes)
            typer.echo(
                f"token {token.id} of {token.owner}, until {token.expires[:10]}: {scopes}  {token.label}".rstrip()
            )


@users_app.command("disable")
def users_disable(name: Name, users: UsersFile = None, debug: Debug = False) -> None:
    """Disable a user immediately: sessions end, tokens stop working."""
    with reported(debug):
        _accounts(users).set_disabled(name, True)
        typer.echo(f"{name} is disabled")


@users_app.command("enable")
def users_enable(name: Name, users: UsersFile = None, debug: Debug = False) -> None:
    """Enable a user again."""
    with reported(debug):
        _accounts(users).set_disabled(name, False)
        typer.echo(f"{name} is enabled again")


@users_app.command("role")
def users_role(
    name: Name, role: Annotated[str, typer.Argument(metavar="ROLE")], users: UsersFile = None, debug: Debug = False
) -> None:
    """Change a user's role: viewer, reviewer or admin."""
    with reported(debug):
        _accounts(users).set_role(name, role)
        typer.echo(f"{name} is now {role}")


@users_app.command("password")
def users_password(
    name: Name, users: UsersFile = None, password_stdin: FromInput = False, debug: Debug = False
) -> None:
    """Set a new password for a user; their sessions end."""
    with reported(debug):
        accounts = _accounts(users)
        accounts.check_known(name)  # before anybody types a password
        accounts.set_password(name, _password(password_stdin))
        typer.echo(f"{name} has a new password and is signed out everywhere")


@users_app.command("token")
def users_token(
    name: Name,
    scope: Annotated[
        list[str], typer.Option("--scope", help="read, diagnose, review, export or admin; may be repeated.")
    ],
    days: Annotated[float, typer.Option("--days", help="How long it is valid.")] = 90.0,
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    users: UsersFile = None,
    debug: Debug = False,
) -> None:
    """Create a token for a program that works on a user's behalf. It is printed once, and cannot be shown again.

    **Example**: `leukoflow users token anna --scope diagnose --days 30 --label scanner`
    """
    with reported(debug):
        token, text = _accounts(users).add_token(name, label, tuple(scope), days)
        typer.echo(text)
        typer.echo(f"token {token.id}, valid until {token.expires[:10]}; `leukoflow users revoke {token.id}`", err=True)


@users_app.command("revoke")
def users_revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `leukoflow users list` shows it.")],
    users: UsersFile = None,
    debug: Debug = False,
) -> None:
    """Revoke a token immediately."""
    with reported(debug):
        _accounts(users).revoke_token(token_id)
        typer.echo(f"token {token_id} has been revoked")


def _accounts(users: Path | None) -> Accounts:
    from leukoflow.apps.web.gate.accounts import Accounts
    from leukoflow.apps.web.settings import checked_users_file

    refuse_remote(**{"--users": users})
    return Accounts(checked_users_file(users, None))


def _password(from_input: bool) -> str:
    if from_input:
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt("password", hide_input=True, confirmation_prompt="again"))
