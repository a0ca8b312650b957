"""Customer portal sessions; the page itself stands in `pages`."""

from __future__ import annotations

from sandbox.stripe.app import Call, route
from sandbox.stripe.customers import live_customer
from sandbox.stripe.store import Obj, new_id

_CONFIGURATION = "bpc_sandbox"


@route("POST", "/v1/billing_portal/sessions", "billing_portal.SessionCreateParams")
def create_portal_session(call: Call) -> Obj:
    p = call.params
    customer = live_customer(call, p.get("customer"))
    token = new_id("", 32)[1:]
    return call.save(
        {
            "id": new_id("bps"),
            "object": "billing_portal.session",
            "configuration": p.get("configuration", _CONFIGURATION),
            "created": call.now,
            "customer": customer["id"],
            "livemode": False,
            "return_url": p.get("return_url"),
            "url": f"{call.base_url}/p/session/{token}",
            "_token": token,
        }
    )
