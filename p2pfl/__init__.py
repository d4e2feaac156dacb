"""p2pfl: federated learning without a server.

A module imports only modules before it in this list (`tests/test_layers.py` checks it):

    values    messages · composition · config · rng
    logic     weights · asynchronous · gathering · conduct · membership · node · topology
    logic     mixing · rules · attacks · compression
    logic     wire · identity · policy · envelope · masks · homomorphic · replicas · records · disclosure · analysis
    edges     data · models · accountant · ledger · private · learner · trainer · inventory
    edges     checkpoint · link · control
    drivers   runtime · swarm · sim
    surface   advise · audit · plots · findings · report · export · progress · status · cli

The journey of an update: `learner` trains, `runtime` performs, `node` decides who gets it, `envelope` seals and signs,
`wire` frames, `link` sends; there `link` receives, `wire` parses, `envelope` verifies and opens, `node` decides when
the round is complete, and `mixing` folds it in.
"""

__version__ = "0.1.0"
