"""The look of the sandbox's pages: one plain style sheet, no script, and a banner that says what they are."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0;background:#f4f5f7;color:#1c2430}
.banner{background:#7a4b00;color:#fff;padding:.5rem 1rem;text-align:center;font-size:.875rem}
main{max-width:30rem;margin:2rem auto;background:#fff;border:1px solid #d5dae2;border-radius:8px;padding:1.5rem 2rem 2rem}
h1{font-size:1.35rem;margin:.25rem 0 1rem}h2{font-size:1.05rem;margin:1.75rem 0 .5rem}
label{display:block;margin:.9rem 0 .25rem;font-weight:600}
input,select{box-sizing:border-box;width:100%;font:inherit;padding:.5rem .6rem;border:1px solid #7b8594;border-radius:5px}
.row{display:flex;gap:1rem}.row>div{flex:1}
button{font:inherit;font-weight:600;margin-top:1.25rem;padding:.6rem 1.2rem;border:0;
border-radius:5px;background:#1f4fbf;color:#fff;cursor:pointer}
button.plain{background:#e6e9ef;color:#1c2430}button.small{margin:0;padding:.25rem .7rem;font-size:.875rem}
.error{background:#fdecea;border:1px solid #b3261e;color:#7d1a14;padding:.6rem .8rem;border-radius:5px}
.muted{color:#566070;font-size:.9rem}a{color:#1f4fbf}table{width:100%;border-collapse:collapse}
td,th{padding:.4rem 0;border-bottom:1px solid #e3e7ed;text-align:left;vertical-align:middle}td.r,th.r{text-align:right}
form.inline{display:inline}
"""


@dataclass(frozen=True, slots=True)
class Page:
    status: int
    body: bytes
    content_type: str = "text/html; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def page(title: str, content: str, *, status: int = 200) -> Page:
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        '<body><div class="banner" role="note">Sandbox of Tailrace, not Stripe. No money moves; use test cards only.</div>'
        f"<main><h1>{esc(title)}</h1>{content}</main></body></html>"
    )
    return Page(status, text.encode(), headers={"Cache-Control": "no-store"})


def redirect(url: str) -> Page:
    return Page(303, b"", headers={"Location": url})


def error(message: str) -> str:
    return f'<p class="error" role="alert">{esc(message)}</p>' if message else ""


def money(amount: int, currency: str) -> str:
    """Minor units for reading: `USD 12.30`; currencies without minor units as they are."""
    if currency in ("jpy", "krw", "vnd", "clp"):
        return f"{currency.upper()} {amount:,}"
    sign = "-" if amount < 0 else ""
    return f"{currency.upper()} {sign}{abs(amount) // 100:,}.{abs(amount) % 100:02d}"


def card_fields(values: dict[str, str]) -> str:
    """Number, expiry, security code and name: labelled, and typed as a browser's autofill knows them."""

    def value(name: str) -> str:
        return esc(values.get(name, ""))

    return (
        '<label for="number">Card number</label><input id="number" name="number" inputmode="numeric" '
        f'autocomplete="cc-number" placeholder="4242 4242 4242 4242" required value="{value("number")}">'
        '<div class="row"><div><label for="expiry">Expiry (MM / YY)</label><input id="expiry" name="expiry" '
        f'autocomplete="cc-exp" placeholder="12 / 34" required value="{value("expiry")}"></div>'
        '<div><label for="cvc">CVC</label><input id="cvc" name="cvc" inputmode="numeric" autocomplete="cc-csc" '
        'placeholder="123" required></div></div>'
        f'<label for="name">Name on card</label><input id="name" name="name" autocomplete="cc-name" required value="{value("name")}">'
    )


def test_cards() -> str:
    rows = (
        ("4242 4242 4242 4242", "works"),
        ("4000 0000 0000 0341", "can be saved, later charges are declined"),
        ("4000 0000 0000 0002", "is declined"),
        ("4000 0000 0000 9995", "has insufficient funds"),
        ("4000 0027 6000 3184", "asks for 3-D Secure every time"),
        ("4000 0025 0000 3155", "asks for 3-D Secure once, when saved"),
    )
    body = "".join(f"<tr><td><code>{n}</code></td><td>{t}</td></tr>" for n, t in rows)
    return f'<h2>Test cards</h2><table class="muted">{body}</table>'
