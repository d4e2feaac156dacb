"""p2pfl: federated learning without a server.

A module imports only modules above it in this list (`tests/test_layers.py` checks it):

    values    messages · config · rng
    logic     conduct · node · topology · mixing · wire · identity · envelope · records · analysis
    edges     data · models · learner · link
    drivers   runtime · swarm
    surface   plots · report · cli
"""

__version__ = "0.1.0"
