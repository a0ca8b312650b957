"""A market that runs by itself for a quarter, faster than time, on the real services: `make sim-market`.

__main__   options, servers, exit code            market    the main loop: to the next instant, act, settle, audit
clock      the time of the run, and its diary     doors     our API over HTTP and Stripe's sandbox, both on real sockets
site       a site as it really is, and its agent  plant     operators and sites, made through the API and the CSV import
house      beat, workers and agents               customers, operators, faults    who acts, and what goes wrong
ladders    prices by term, share due at signing and curtailment: asked and chosen
auditor    what must hold, in rooms of its own: states, promises, priced, books    report    what happened, and the verdict
"""
