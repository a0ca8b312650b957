"""`python -m sandbox.stripe --port P --state FILE [--webhook URL --webhook-secret S ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading

from sandbox.stripe import events, resources
from sandbox.stripe.server import Server
from sandbox.stripe.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.stripe", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="loopback only, unless you know why")
    parser.add_argument("--port", type=int, default=12111, help="0 picks a free port, printed on the first line")
    parser.add_argument("--state", required=True, help="SQLite file; a restart with the same file forgets nothing")
    parser.add_argument("--webhook", help="URL that receives every event")
    parser.add_argument("--webhook-secret", action="append", default=[], help="whsec_...; repeat it while rotating")
    args = parser.parse_args()
    if args.webhook and not args.webhook_secret:
        parser.error("--webhook needs at least one --webhook-secret")
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "WARNING"), format="%(name)s %(levelname)s %(message)s")
    resources.load()
    store = Store(args.state)
    with store.transaction():
        store.delete(events.COMMAND_LINE_ENDPOINT)
        if args.webhook:
            events.create_endpoint(
                store, args.webhook, "", ["*"], id=events.COMMAND_LINE_ENDPOINT, _secrets=args.webhook_secret
            )
    server = Server((args.host, args.port), store)
    server.deliverer.start()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"stripe sandbox on {server.base_url}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.deliverer.stop()
    server.server_close()
    store.close()


if __name__ == "__main__":
    main()
