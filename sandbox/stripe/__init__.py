"""A stateful Stripe of our own over a real socket: what the product talks to where no Stripe key is configured.

It is *ours*, not Stripe's and not an independent peer; `docs/sandbox-stripe.md` says what it does and does not do.
Two things keep it honest: every request and every response is checked against the types that the official SDK
generates from Stripe's own OpenAPI document, and the contract suite runs unchanged against a real Stripe test key.
"""

API_VERSION = "2026-10-28.endive"
