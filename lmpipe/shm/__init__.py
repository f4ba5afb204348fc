"""Shared memory: segments, slots, holds, sessions, counters. Knows nothing of messages, engines or tiers."""
