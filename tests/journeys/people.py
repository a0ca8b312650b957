"""Who walks through a journey: people with a session each, who speak to the product's pages and its API alone, at a clock's time."""

from typing import Any

from rest_framework.test import APIClient

from marketplace.models import Organization
from sandbox.market.clock import Clock
from tests import factories as f


class Person:
    """`clock` has the time as `now`: a `Yard`, or anything else that does. Nobody yet, until they sign up or are let in."""

    def __init__(self, clock: Any, client: APIClient | None = None):
        self.clock, self.client = clock, client or APIClient()

    def at(self, call):
        """Its answer, given at the clock's time."""
        with Clock(self.clock.now):
            return call()

    # --- the API
    def get(self, path, **query):
        return self._answer(lambda: self.client.get(f"/api/v1/{path}", query), 200)

    def post(self, path, body=None, status=201):
        return self._answer(lambda: self.client.post(f"/api/v1/{path}", body or {}, format="json"), status)

    def patch(self, path, body):
        return self._answer(lambda: self.client.patch(f"/api/v1/{path}", body, format="json"), 200)

    def _answer(self, call, status):
        answer = self.at(call)
        assert answer.status_code == status, answer.content
        return answer.json() if "json" in answer["Content-Type"] else answer.content.decode()

    # --- pages
    def page(self, path, form=None, **query):
        """A page as it is shown, or its form sent in and its redirects followed."""
        if form is None:
            answer = self.at(lambda: self.client.get(path, query, follow=True))
        else:
            answer = self.at(lambda: self.client.post(path, form, follow=True))
        assert answer.status_code == 200, answer.content.decode()
        return answer


class Member(Person):
    """Of an organization that is there already."""

    def __init__(self, clock: Any, organization: Organization, role: str = "owner"):
        super().__init__(clock, f.client(organization, role))

    def book(self, listing, kind, gpus, **more):
        """A contract, by way of its quote."""
        quote = self.post("quotes", {"listing": listing, "kind": kind, "gpu_count": gpus, **more})
        return self.post("contracts", quote["accept"]["body"])
