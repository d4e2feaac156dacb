"""The real `p2pfl.node` in virtual time, under faults that a seed draws: same seed, same trace, byte for byte.

faults      what goes wrong and when, as data         scenario    a network, its settings and its faults, as data
world       machines, disks, processes, links         invariants  what must hold after every event, each by name
engine      one loop over the effects of all nodes    experiment  real learners in it: `p2pfl simulate`
bench       how fast it is                            relay_sum   what encrypted sums cost, in real processes
"""
