"""Papers: the terms of service by version and who accepted them, and each contract's order form and amendments, kept for good.

A text of the terms is a file of this repository, `terms/VERSION.html` among the templates; the newest is in force. A new version
is a new file: an organization is asked for it at its next contract. A contract's papers are written when it is signed or changed,
with their hash, and never again (a trigger refuses it).
"""

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from hashlib import sha256
from typing import Any

from django.template.loader import render_to_string

from marketplace.errors import MarketError
from marketplace.models import Amendment, Contract, ContractDocument, DocumentFile, TermsAcceptance
from marketplace.services import audit, pdf
from marketplace.tenancy import Actor

VERSIONS = ("2026-11-01",)  # newest last
CURRENT = VERSIONS[-1]


@dataclass(frozen=True)
class Terms:
    """One version of the terms of service; `digest` is the SHA-256 of the HTML as UTF-8."""

    version: str
    html: str
    digest: str


@cache
def terms(version: str = CURRENT) -> Terms:
    """MarketError("not_found") for a version that never was."""
    if version not in VERSIONS:
        raise MarketError("not_found", f"There are no terms of service {version}; the present ones are {CURRENT}.")
    html = render_to_string(f"terms/{version}.html")
    return Terms(version, html, digest(html))


def digest(html: str) -> str:
    return sha256(html.encode()).hexdigest()


def acceptance(organization_id: int | None) -> TermsAcceptance | None:
    """Who accepted the present terms for the organization, if somebody has."""
    if organization_id is None:
        return None
    rows = TermsAcceptance.objects.filter(organization_id=organization_id, version=CURRENT)
    found: TermsAcceptance | None = rows.first()
    return found


def accept_terms(actor: Actor, version: str, *, now: datetime) -> TermsAcceptance:
    """For the actor's organization, once. MarketError("terms_not_accepted") where `version` is not the one in force."""
    if actor.organization_id is None:
        raise MarketError("organization_required", "Terms are accepted for an organization.")
    if version != CURRENT:
        raise _not_accepted(f"{version} is not in force; {CURRENT} is.")
    row, fresh = TermsAcceptance.objects.get_or_create(
        organization_id=actor.organization_id,
        version=version,
        defaults={
            "digest": terms(version).digest, "accepted_at": now, "accepted_by": actor.label[:120], "user_id": actor.user_id,
        },
    )  # fmt: skip
    if fresh:
        audit.record(actor, "terms.accepted", version, now=now, after={"digest": row.digest})
    return row


def require_terms(organization_id: int) -> None:
    """MarketError("terms_not_accepted") unless the present terms were accepted for the organization."""
    if acceptance(organization_id) is None:
        raise _not_accepted(f"Version {CURRENT} has not been accepted for this organization.")


def _not_accepted(detail: str) -> MarketError:
    body = {"method": "POST", "path": "/api/v1/terms", "body": {"version": CURRENT}}
    extra = {"terms": {"version": CURRENT, "digest": terms().digest, "page": "/terms", "accept": body}}
    return MarketError(
        "terms_not_accepted", f"{detail} Read /terms, and accept it with the contract or before.", extra=extra
    )


# --- the papers of a contract
def keep_order_form(contract: Contract, *, now: datetime) -> ContractDocument:
    """The order form as signed, from the contract's own frozen terms and who accepted the terms of service."""
    title = f"Order form {contract.public_id}"
    return _keep(contract, ContractDocument.Kind.ORDER_FORM, title, "paper/order_form.html", {}, now)


def keep_amendment(amendment: Amendment, *, now: datetime) -> ContractDocument:
    """What was changed, as accepted."""
    contract = amendment.contract
    title = f"Amendment {amendment.public_id} of {contract.public_id}"
    extra = {"amendment": amendment}
    return _keep(contract, ContractDocument.Kind.AMENDMENT, title, "paper/amendment.html", extra, now, amendment)


def _keep(
    contract: Contract,
    kind: str,
    title: str,
    template: str,
    extra: dict[str, Any],
    now: datetime,
    amendment: Amendment | None = None,
) -> ContractDocument:
    accepted = acceptance(contract.organization_id)
    facts = {
        "contract": contract, "agreed": contract.terms, "customer": contract.organization, "operator": contract.operator,
        "title": title, "accepted": accepted, "made_at": now,
    }  # fmt: skip
    html = render_to_string(template, {**facts, **extra})
    return ContractDocument.objects.create(
        contract=contract, amendment=amendment, kind=kind, title=title, html=html, digest=digest(html), created_at=now
    )


# --- as PDF files
def file_of(document: ContractDocument, *, now: datetime) -> DocumentFile:
    """The paper as a PDF: made from its HTML when it is first asked for, and the same file ever after, whoever asks at once."""
    found = DocumentFile.objects.filter(document=document).first()
    if found is None:
        kept = f"Kept since {document.created_at:%-d %b %Y %H:%M} UTC as {document.public_id}."
        body = pdf.render(title=document.title, html=document.html, digest=document.digest, kept=kept)
        found, _ = DocumentFile.objects.get_or_create(
            document=document, defaults={"body": body, "digest": sha256(body).hexdigest(), "created_at": now}
        )
    return found


@cache
def terms_file(version: str = CURRENT) -> bytes:
    """One version of the terms of service as a PDF. MarketError("not_found") for one that never was."""
    found = terms(version)
    title = f"Terms of service {version}"
    return pdf.render(title=title, html=found.html, digest=found.digest, kept=f"Version {version}.")
