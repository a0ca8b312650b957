"""Forms: shapes only. What is allowed is the services' business; their refusals are shown with `refuse`."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from django import forms

from billing.core import money
from marketplace.errors import MarketError
from marketplace.models import Contract, Job, Kind, Listing
from marketplace.services import job_rules, price_tiers
from marketplace.services.availability import HOLDING
from marketplace.tenancy import ROLES, SCOPES, Actor
from marketplace.web.tags import LEVEL_WORDS, kind_words, price
from scheduler.core.capacity import LEVELS


class Instant(forms.DateTimeField):
    """`datetime-local`, read as UTC, to the minute."""

    widget = forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M")

    def to_python(self, value: Any) -> datetime | None:
        found = super().to_python(value)
        return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def refuse(form: forms.BaseForm, error: MarketError, names: dict[str, str] | None = None) -> None:
    """Puts a refusal where it belongs: beside the fields it names, else above the form. `names`: pointer -> field, where they differ."""
    for pointer, message in error.fields.items():
        name = (names or {}).get(pointer.lstrip("/"), pointer.lstrip("/"))
        if name in form.fields:
            form.add_error(name, message)


def millionths(value: Decimal | None) -> int | None:
    """Of the major unit."""
    return None if value is None else int(value * money.MILLIONTHS)


def permille(value: Decimal | None) -> int | None:
    """Of a share in per cent."""
    return None if value is None else int(value * 10)


def percent(value: int | None) -> str | None:
    """A share in per mille, as it is typed in."""
    return None if value is None else f"{Decimal(value) / 10:f}"


class QuoteForm(forms.Form):
    kind = forms.ChoiceField(label="Contract", widget=forms.RadioSelect)
    gpu_count = forms.IntegerField(label="GPUs", min_value=1, max_value=1_000_000)
    level = forms.ChoiceField(label="All of them in", choices=[(v, LEVEL_WORDS[v]) for v in reversed(LEVELS)])
    starts_at = Instant(label="Start (UTC)", required=False, help_text="Empty: at once.")
    ends_at = Instant(label="End (UTC)", required=False, help_text="Reserved and flexible need one.")
    limit_price = forms.DecimalField(
        label="Your limit per GPU-hour", required=False, min_value=0, max_digits=9, decimal_places=6,
        help_text="Spot only: the most that you would pay. The price is the same for all who run, and often lower.",
    )  # fmt: skip
    upfront_max_permille = forms.TypedChoiceField(
        label="Due at signing, at most", required=False, coerce=int, empty_value=None,
        help_text="Reserved and flexible: the more, the less a GPU-hour costs. It is drawn down first.",
    )  # fmt: skip
    flexible_hours_max = forms.TypedChoiceField(
        label="Curtailment, at most", required=False, coerce=int, empty_value=None,
        help_text="Flexible: hours a month that the grid may take; they are not billed.",
    )  # fmt: skip
    reference = forms.CharField(label="Your reference", required=False, max_length=80)

    def __init__(self, *args: Any, listing: Listing, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        held = {kind: list(price_tiers.options(listing, kind)) for kind in HOLDING}
        shares = sorted({o.upfront_permille for options in held.values() for o in options})
        hours = sorted({o.flexible_hours_per_month for o in held[Kind.FLEXIBLE]})
        for name, values, words in (
            ("upfront_max_permille", shares, lambda n: f"{percent(n)} % of the commitment" if n else "nothing"),
            ("flexible_hours_max", hours, lambda n: f"{n} hours a month"),
        ):
            if len(values) > 1:
                field: Any = self.fields[name]
                field.choices = [("", "as the plain price asks"), *((n, words(n)) for n in values)]
            else:
                del self.fields[name]
        choice: Any = self.fields["kind"]
        choice.choices = [
            (
                k,
                f"{kind_words(k)}: {'from ' if k == Kind.SPOT or len(all_) > 1 else ''}{price(p, listing.currency)} per GPU-hour",
            )
            for k in Kind.values
            if (all_ := list(price_tiers.options(listing, k))) and (p := min(all_).price)
        ]
        self.fields["gpu_count"].help_text = f"At least {listing.min_gpus}." if listing.min_gpus > 1 else ""


class AmendForm(forms.Form):
    kind = forms.ChoiceField(choices=[("extend", "Later end"), ("resize", "More GPUs"), ("price", "Price")])
    ends_at = Instant(label="New end", required=False)
    gpu_count = forms.IntegerField(label="GPUs in all", required=False, min_value=1, max_value=1_000_000)
    price = forms.DecimalField(label="Price", required=False, min_value=0, max_digits=15, decimal_places=6)
    effective_at = Instant(label="From", required=False)
    reason = forms.CharField(label="Why", required=False, max_length=200)

    NEEDED = {"extend": "ends_at", "resize": "gpu_count", "price": "price"}

    def clean(self) -> dict[str, Any]:
        asked = super().clean() or {}
        needed = self.NEEDED.get(asked.get("kind", ""))
        if needed and asked.get(needed) is None and needed not in self.errors:
            self.add_error(needed, "is needed.")
        return asked

    def wrong(self) -> list[str]:
        return [f"{self[name].label}: {message}" for name, found in self.errors.items() for message in found]


class JobForm(forms.Form):
    contract = forms.ChoiceField(label="Contract")
    name = forms.CharField(label="Name", required=False, max_length=120)
    command = forms.CharField(
        label="Command", max_length=100_000, strip=False,
        widget=forms.Textarea(attrs={"rows": 5, "spellcheck": "false", "class": "mono"}),
        help_text="Run by /bin/sh on each replica; several lines are a script.",
    )  # fmt: skip
    replicas = forms.IntegerField(
        label="Replicas", min_value=1, max_value=4096, initial=1, help_text="All start together, or none."
    )
    gpus = forms.IntegerField(label="GPUs per replica", min_value=0, max_value=16, initial=1)
    vcpu = forms.IntegerField(label="vCPU per replica", min_value=0, max_value=10_000, initial=4)
    ram_gib = forms.IntegerField(label="RAM per replica, GiB", min_value=0, max_value=97_000, initial=16)
    vram_gib = forms.IntegerField(label="GPU memory from, GiB", min_value=0, max_value=2_000, initial=0, required=False)
    nvme_gib = forms.IntegerField(
        label="Scratch disk, GiB", min_value=0, max_value=1_000_000, initial=0, required=False
    )
    image = forms.CharField(label="Image", required=False, max_length=300, help_text="Where the site runs containers.")
    topology = forms.ChoiceField(
        label="Placement", required=False,
        choices=[("pack", "Pack closely"), ("spread", "Spread out"), ("host", "In one host"), ("leaf", "In one leaf"),
                 ("spine", "In one fabric"), ("site", "In one site")],
    )  # fmt: skip
    topology_required = forms.BooleanField(label="Wait until exactly that placement is possible", required=False)
    nvlink = forms.ChoiceField(
        label="NVLink among a replica's GPUs", required=False,
        choices=[("any", "Not needed"), ("preferred", "Where possible"), ("required", "Required")],
    )  # fmt: skip
    spread_level = forms.ChoiceField(
        label="Spread over", required=False,
        choices=[("", "As placement says"), ("host", "Hosts"), ("leaf", "Leaves"), ("spine", "Fabrics")],
    )  # fmt: skip
    max_per_domain = forms.IntegerField(
        label="Replicas in one of these, at most", required=False, min_value=1, max_value=4096
    )
    on_replica_loss = forms.ChoiceField(
        label="When a replica is lost", required=False,
        choices=[("restart_gang", "All start again"), ("replace_replica", "That one is placed again"), ("shrink", "Go on with fewer")],
    )  # fmt: skip
    min_replicas = forms.IntegerField(label="Fewest replicas that go on", required=False, min_value=1, max_value=4096)
    labels = forms.CharField(
        label="Labels", required=False, help_text="name=value, one a line.", max_length=4000,
        widget=forms.Textarea(attrs={"rows": 2, "spellcheck": "false", "class": "mono"}),
    )  # fmt: skip
    near = forms.CharField(
        label="Close to jobs labelled", required=False, max_length=4000, help_text="host, leaf, spine or site, then labels: leaf app=db",
        widget=forms.Textarea(attrs={"rows": 2, "spellcheck": "false", "class": "mono"}),
    )  # fmt: skip
    apart = forms.CharField(
        label="Apart from jobs labelled", required=False, max_length=4000, help_text="As above, one rule a line.",
        widget=forms.Textarea(attrs={"rows": 2, "spellcheck": "false", "class": "mono"}),
    )  # fmt: skip
    price_limit = forms.DecimalField(
        label="Wait while a GPU-hour costs more than", required=False, min_value=0, max_digits=9, decimal_places=6
    )
    max_restarts = forms.IntegerField(
        label="Restarts after faults", min_value=0, max_value=100, initial=3, required=False
    )
    checkpoint_grace_s = forms.IntegerField(
        label="Checkpoint grace, s", min_value=0, max_value=3600, initial=30, required=False,
        help_text="Between the signal and the end, when the job must leave.",
    )  # fmt: skip
    movable = forms.BooleanField(
        label="May be moved to another host", required=False,
        help_text="To make room: it gets that signal, saves its work, stops, and goes on elsewhere. You do not pay meanwhile. Spot"
        " work may be moved anyhow.",
    )  # fmt: skip
    max_minutes = forms.IntegerField(label="Stop after, minutes", min_value=1, max_value=1_000_000, required=False)
    priority = forms.IntegerField(label="Priority", min_value=-100, max_value=100, initial=0, required=False)
    env = forms.CharField(
        label="Environment", required=False, help_text="NAME=value, one a line.", max_length=200_000,
        widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false", "class": "mono"}),
    )  # fmt: skip
    secrets = forms.CharField(
        label="Secrets", required=False, help_text="NAME=value, one a line. Encrypted; never shown again.", max_length=200_000,
        widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false", "class": "mono", "autocomplete": "off"}),
    )  # fmt: skip
    reference = forms.CharField(label="Your reference", required=False, max_length=80)

    MAIN = ("contract", "name", "command", "replicas", "gpus", "vcpu", "ram_gib")
    FIELDS_OF = {"vcpu_milli": "vcpu", "ram_mib": "ram_gib", "vram_mib": "vram_gib", "max_seconds": "max_minutes"}

    def __init__(self, *args: Any, contracts: list[Contract], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        choice: Any = self.fields["contract"]
        choice.choices = [
            (c.public_id, f"{c.listing.title}: {c.gpu_count} GPUs, {kind_words(c.kind).lower()}") for c in contracts
        ]

    def main(self) -> list[forms.BoundField]:
        return [self[name] for name in self.MAIN]

    def more(self) -> list[forms.BoundField]:
        return [field for field in self if field.name not in self.MAIN]

    def clean_labels(self) -> list[str]:
        return job_rules.pairs(_words(_pairs(self.cleaned_data["labels"], name=job_rules.WORD)))

    def clean_near(self) -> list[dict[str, Any]]:
        return _rules(job_rules.NEAR, self.cleaned_data["near"])

    def clean_apart(self) -> list[dict[str, Any]]:
        return _rules(job_rules.APART, self.cleaned_data["apart"])

    def clean(self) -> dict[str, Any]:
        asked: dict[str, Any] = super().clean() or {}
        if len(asked.get("near", ())) + len(asked.get("apart", ())) > job_rules.MAX_RULES:
            self.add_error("apart", f"Close to and apart from: at most {job_rules.MAX_RULES} rules together.")
        return asked

    def clean_env(self) -> dict[str, str]:
        return _pairs(self.cleaned_data["env"])

    def clean_secrets(self) -> dict[str, str]:
        return _pairs(self.cleaned_data["secrets"])

    def spec(self) -> dict[str, Any]:
        """Of `services.jobs.submit`; call it on a valid form."""
        asked = self.cleaned_data
        plain = (
            *("name", "replicas", "gpus", "image", "topology_required", "env", "secrets", "reference", "labels"),
            *("spread_level", "max_per_domain", "min_replicas", "movable"),
        )
        return {
            **{name: asked[name] for name in plain},
            "command": ["/bin/sh", "-c", asked["command"].replace("\r\n", "\n")],
            "topology": asked["topology"] or Job.Topology.PACK,
            "nvlink": asked["nvlink"] or Job.Nvlink.ANY,
            "on_replica_loss": asked["on_replica_loss"] or Job.OnReplicaLoss.RESTART_GANG,
            "affinity": asked["near"] + asked["apart"],
            "price_limit": millionths(asked["price_limit"]),
            "vcpu_milli": asked["vcpu"] * 1000,
            "ram_mib": asked["ram_gib"] * 1024,
            "vram_mib": (asked["vram_gib"] or 0) * 1024,
            "nvme_gib": asked["nvme_gib"] or 0,
            "priority": asked["priority"] or 0,
            "max_restarts": 3 if asked["max_restarts"] is None else asked["max_restarts"],
            "checkpoint_grace_s": 30 if asked["checkpoint_grace_s"] is None else asked["checkpoint_grace_s"],
            "max_seconds": asked["max_minutes"] * 60 if asked["max_minutes"] else None,
        }


def _words(labels: dict[str, str]) -> dict[str, str]:
    wrong = next((value for value in labels.values() if not re.match(job_rules.WORD, value)), None)
    if wrong is not None or len(labels) > job_rules.MAX_LABELS:
        raise forms.ValidationError(f"At most {job_rules.MAX_LABELS} labels, of letters, digits and _ . / - ({wrong}).")
    return labels


def _rules(rule: str, text: str) -> list[dict[str, Any]]:
    """`leaf app=db tier=1`, one rule a line."""
    found = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        level, *labels = line.split()
        if level not in job_rules.LEVELS or not labels or number > job_rules.MAX_RULES:
            raise forms.ValidationError(
                f"Rule {number} is not of the form: {', '.join(job_rules.LEVELS)}, then name=value."
            )
        named = _words(_pairs("\n".join(labels), name=job_rules.WORD))
        found.append({"rule": rule, "level": level, "labels": job_rules.pairs(named)})
    return found


def _pairs(text: str, name: str = r"^[^\W\d]\w*$") -> dict[str, str]:
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, equals, value = line.partition("=")
        if not equals or not re.match(name, key.strip()):
            raise forms.ValidationError(f"Line {number} is not of the form NAME=value.")
        found[key.strip()] = value.strip()
    return found


class OrganizationForm(forms.Form):
    name = forms.CharField(label="Name", max_length=120, widget=forms.TextInput(attrs={"autocomplete": "organization"}))
    country = forms.RegexField(
        "^[A-Za-z]{2}$",
        label="Country",
        initial="US",
        help_text="Two letters, as on your invoices.",
        error_messages={"invalid": "Two letters, such as US or DE."},
    )
    currency = forms.ChoiceField(label="Currency", choices=[(c, c) for c in ("USD", "EUR", "GBP")])
    mode = forms.ChoiceField(
        label="Market", widget=forms.RadioSelect,
        choices=[("live", "Live: real capacity, real money"), ("test", "Test: simulated sites, test cards")],
    )  # fmt: skip


class Lines(forms.CharField):
    """A value a line; empty lines do not count."""

    widget = forms.Textarea(attrs={"rows": 3})

    def to_python(self, value: Any) -> list[str]:  # type: ignore[override]  # a list of what CharField gives one of
        found = super().to_python(value) or ""
        return [line.strip() for line in found.splitlines() if line.strip()]

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(value) if isinstance(value, list) else value


class ProfileForm(forms.Form):
    """What an organization tells of itself for its screening."""

    legal_name = forms.CharField(
        label="Legal name", max_length=160, help_text="As registered.", widget=forms.TextInput(attrs={"autocomplete": "organization"})
    )  # fmt: skip
    registration_number = forms.CharField(
        label="Registration number", max_length=60, help_text="Of the company register or the tax office."
    )
    address = forms.CharField(
        label="Registered address", max_length=300, widget=forms.Textarea(attrs={"rows": 3, "autocomplete": "street-address"})
    )  # fmt: skip
    website = forms.URLField(label="Website", max_length=200, required=False, assume_scheme="https")
    beneficial_owners = Lines(
        label="Beneficial owners", max_length=2000,
        help_text="Full names, one a line: the people who own or control a quarter of it or more; without any, who directs it.",
    )  # fmt: skip
    end_use = forms.CharField(
        label="What the GPUs are used for", max_length=500, widget=forms.Textarea(attrs={"rows": 3}),
        help_text="In a sentence or two.",
    )  # fmt: skip
    end_use_countries = forms.RegexField(
        r"^\s*[A-Za-z]{2}([\s,]+[A-Za-z]{2})*\s*$", label="Countries of use", max_length=240,
        help_text="Where the results are used: two letters each, as US, DE.", error_messages={"invalid": "Two letters each, as US, DE."},
    )  # fmt: skip

    def clean_beneficial_owners(self) -> list[str]:
        found: list[str] = self.cleaned_data["beneficial_owners"]
        if any(len(name) > 160 for name in found) or len(found) > 30:
            raise forms.ValidationError("At most 30 names, of 160 letters each.")
        return found

    def clean_end_use_countries(self) -> list[str]:
        return sorted({code.upper() for code in re.findall("[A-Za-z]{2}", self.cleaned_data["end_use_countries"])})


class InviteForm(forms.Form):
    email = forms.EmailField(label="E-mail", widget=forms.EmailInput(attrs={"autocomplete": "off"}))
    role = forms.ChoiceField(label="Role", choices=[(r, r) for r in ROLES], initial="engineer")


class JoinForm(forms.Form):
    token = forms.CharField(label="Invitation", max_length=80)


class KeyForm(forms.Form):
    name = forms.CharField(label="Name", max_length=80, help_text="Where it will be used.")
    days = forms.IntegerField(
        label="Expires after, days", required=False, min_value=1, max_value=3650, help_text="Empty: never."
    )
    scopes = forms.MultipleChoiceField(label="May", widget=forms.CheckboxSelectMultiple)

    def __init__(self, *args: Any, actor: Actor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        choice: Any = self.fields["scopes"]
        choice.choices = [(s, s) for s in SCOPES if actor.may(s)]
