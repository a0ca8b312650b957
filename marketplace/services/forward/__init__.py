"""The forward market, by subject. Together these modules are the only writers of Resale, Fill and StandingBid.

pieces    a contract's reservation, cut into what is sold and what stays
resales   a holder offers part of a contract, takes it back, or it expires
sales     what stands sold, and what is undone
buying    what a quote and a signature do differently where the offer is a resale
bids      what buyers wait for, matched with what is offered
book      depth and fills, for everybody
"""
