"""Forms of the forward market: shapes only, as in web.forms."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from django import forms

from marketplace.services.forward import bids, resales
from marketplace.web.forms import Instant, millionths
from marketplace.web.tags import LEVEL_WORDS
from scheduler.core.capacity import LEVELS


class ResaleForm(forms.Form):
    gpu_count = forms.IntegerField(label="GPUs", min_value=1, max_value=1_000_000)
    price = forms.DecimalField(
        label="Price per GPU-hour",
        min_value=0,
        max_digits=9,
        decimal_places=6,
        help_text="What the buyer pays; our fee is inside.",
    )
    starts_at = Instant(label="From (UTC)")
    ends_at = Instant(label="Until (UTC)")

    def asked(self) -> resales.Asked:
        """Of `services.forward.resales`; call it on a valid form."""
        asked = self.cleaned_data
        price = millionths(asked["price"]) or 0
        return resales.Asked(asked["gpu_count"], asked["starts_at"], asked["ends_at"], price)


class BidForm(forms.Form):
    gpu_model = forms.ChoiceField(label="GPU")
    region = forms.ChoiceField(label="Region")
    kind = forms.ChoiceField(label="Contract", choices=[("reserved", "Reserved"), ("flexible", "Flexible")])
    gpu_count = forms.IntegerField(label="GPUs", min_value=1, max_value=1_000_000)
    min_gpus = forms.IntegerField(
        label="In parts of at least",
        required=False,
        min_value=1,
        max_value=1_000_000,
        help_text="Empty: all of them or none.",
    )
    level = forms.ChoiceField(label="All of them in", choices=[(v, LEVEL_WORDS[v]) for v in reversed(LEVELS)])
    earliest = Instant(label="Earliest start (UTC)")
    latest = Instant(label="Latest start (UTC)", required=False, help_text="Empty: it begins at the earliest.")
    hours = forms.IntegerField(label="Hours", min_value=1, max_value=26_304)
    limit_price = forms.DecimalField(
        label="Your limit per GPU-hour",
        min_value=0,
        max_digits=9,
        decimal_places=6,
        help_text="You pay what is asked, never more than this.",
    )
    expires_at = Instant(label="The bid stands until (UTC)")
    auto_accept = forms.BooleanField(
        label="Sign for us at once", required=False,
        help_text="We agree that each quote of this bid is accepted for us, at up to the limit, and charged.",
    )  # fmt: skip
    reference = forms.CharField(label="Your reference", required=False, max_length=80)

    def __init__(
        self, *args: Any, models: Sequence[str], regions: Sequence[str], may_sign: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, values in (("gpu_model", models), ("region", regions)):
            field: Any = self.fields[name]
            field.choices = [(value, value) for value in values]
        if not may_sign:
            del self.fields["auto_accept"]

    def wanted(self) -> bids.Wanted:
        """Of `services.forward.bids`; call it on a valid form."""
        asked = self.cleaned_data
        same = (
            "gpu_model",
            "region",
            "kind",
            "gpu_count",
            "min_gpus",
            "level",
            "earliest",
            "latest",
            "expires_at",
            "reference",
        )
        return bids.Wanted(
            **{name: asked[name] for name in same},
            duration_s=int(timedelta(hours=asked["hours"]).total_seconds()),
            limit_price=millionths(asked["limit_price"]) or 0,
            auto_accept=asked.get("auto_accept", False),
        )


class BookForm(forms.Form):
    of = forms.ChoiceField(label="Book", required=False)

    def __init__(self, *args: Any, books: Sequence[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.books = {f"{model}@{region}": (model, region) for model, region in books}
        field: Any = self.fields["of"]
        field.choices = [(key, f"{model}, {region}") for key, (model, region) in self.books.items()]

    def chosen(self) -> tuple[str, str] | None:
        """The book asked for, else the first there is."""
        return self.books.get(self.data.get("of", ""), next(iter(self.books.values()), None))
