"""p2pfl: federated learning without a server.

A module imports only modules before it in this list (`tests/test_layers.py` checks it):

    values    messages · composition · config · rng
    logic     weights · asynchronous · conduct · membership · node · topology
    logic     mixing · rules · attacks · compression
    logic     wire · identity · envelope · replicas · records · analysis
    edges     data · models · learner · trainer · checkpoint · link · control
    drivers   runtime · swarm · sim
    surface   advise · plots · report · export · progress · status · cli

The journey of an update: `learner` trains, `runtime` performs, `node` decides who gets it, `envelope` seals and signs,
`wire` frames, `link` sends; there `link` receives, `wire` parses, `envelope` verifies and opens, `node` decides when
the round is complete, and `mixing` folds it in.
"""

__version__ = "0.1.0"
