"""What the compiler makes of a decoding step: launches, bytes, collectives, graphs, memory; for a
GPU that need not be there.
"""
