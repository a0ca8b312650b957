"""Prices in an operator's form: typed in the major unit, whole millionths inside; price tiers as a small table."""

from decimal import Decimal, InvalidOperation
from typing import Any, Final

from django import forms
from django.template.loader import render_to_string
from django.utils.safestring import SafeString

from marketplace.admin import look
from marketplace.services.availability import HOLDING


class PriceField(forms.CharField):
    """Typed in the major unit, `2.49`; an integer of millionths inside. No float in between."""

    def prepare_value(self, value: Any) -> Any:
        if isinstance(value, int):
            whole, rest = divmod(value, look.MICRO)
            return f"{whole}.{f'{rest:06d}'.rstrip('0').ljust(2, '0')}"
        return value

    def to_python(self, value: Any) -> int | None:  # type: ignore[override]
        if isinstance(value, int):
            return value
        text = (super().to_python(value) or "").replace(",", "").strip()
        if not text:
            return None
        try:
            millionths = Decimal(text) * look.MICRO
            exact = millionths == millionths.to_integral_value()
        except InvalidOperation:
            raise forms.ValidationError("is no price: write it as 2.49") from None
        if not exact or not 0 < millionths < 10**15:
            raise forms.ValidationError("must be positive, with at most six digits after the point")
        return int(millionths)

    def validate(self, value: Any) -> None:
        if value is None and self.required:
            raise forms.ValidationError(self.error_messages["required"])

    def run_validators(self, value: Any) -> None:
        """`to_python` has said all there is."""

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return self.to_python(data) != initial
        except forms.ValidationError:
            return True


COLUMNS: Final = ("kind", "min_term_hours", "upfront_permille", "flexible_hours_per_month", "price")
BLANK = 3  # empty rows to type into


class TiersWidget(forms.Widget):
    """A row a tier; a row without a price is no tier."""

    def render(self, name: str, value: Any, attrs: Any = None, renderer: Any = None) -> SafeString:  # noqa: ARG002
        rows = [*(value or ()), *({} for _ in range(BLANK))]
        kinds = [(kind.value, kind.label) for kind in HOLDING]
        id_ = (attrs or {}).get("id", name)
        return render_to_string("desk/tiers.html", {"name": name, "rows": rows, "kinds": kinds, "id": id_})

    def value_from_datadict(self, data: Any, files: Any, name: str) -> list[dict[str, str]]:  # noqa: ARG002
        columns = [data.getlist(f"{name}_{column}") for column in COLUMNS]
        typed = [dict(zip(COLUMNS, map(str.strip, row), strict=True)) for row in zip(*columns, strict=False)]
        return [row for row in typed if any(row[column] for column in COLUMNS[1:])]

    def value_omitted_from_data(self, data: Any, files: Any, name: str) -> bool:  # noqa: ARG002
        return f"{name}_kind" not in data

    def id_for_label(self, id_: str) -> str:  # the first box of the table
        return f"{id_}_0_kind"


class TiersField(forms.Field):
    """As `Listing.price_tiers` keeps them. What is typed: shares in per cent, prices in the major unit."""

    widget = TiersWidget

    def __init__(self) -> None:
        super().__init__(
            required=False, label="Prices by term",
            help_text="Beside the plain prices: for terms from so many hours on, with so much of the commitment due at signing, and, "
            "flexible, so many hours of curtailment a month. A quote takes the cheapest that meets what is asked. Empty a row to drop it.",
        )  # fmt: skip

    def prepare_value(self, value: Any) -> Any:
        return [self._typed(row) for row in value or ()]

    @staticmethod
    def _typed(row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row["price"], int):
            return row  # as it came from the form
        return {
            **row,
            "upfront_permille": f"{Decimal(row['upfront_permille']) / 10:f}",
            "price": PriceField().prepare_value(row["price"]),
        }

    def to_python(self, value: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, row in enumerate(value or (), 1):
            try:
                found.append(
                    {
                        "kind": row["kind"],
                        "min_term_hours": int(row["min_term_hours"] or 1),
                        "upfront_permille": self._permille(row["upfront_permille"] or "0"),
                        "flexible_hours_per_month": int(row["flexible_hours_per_month"] or 0),
                        "price": PriceField(error_messages={"required": "is needed"}).clean(row["price"]),
                    }
                )
            except forms.ValidationError as error:
                raise forms.ValidationError(f"Row {number}: the price {error.messages[0]}") from None
            except (ValueError, InvalidOperation):
                raise forms.ValidationError(
                    f"Row {number}: hours are whole numbers, shares per cent with at most one digit after the point."
                ) from None
        return found

    @staticmethod
    def _permille(text: str) -> int:
        exact = Decimal(text.rstrip("% ")) * 10
        if exact != exact.to_integral_value() or not exact.is_finite():
            raise ValueError(text)
        return int(exact)

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return self.to_python(data) != (initial or [])
        except forms.ValidationError:
            return True
