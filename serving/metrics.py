"""Prometheus metrics `moerge_*`; vLLM's own stand beside them in the same registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("moerge_requests", "Inference requests", ["policy", "kind", "status"])
SELECTED = Counter("moerge_expert_requests", "Requests that an expert answered", ["expert"])
ROUTE_SECONDS = Histogram(
    "moerge_route_seconds",
    "Time to a decision",
    ["method"],
    buckets=(0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024),
)
FALLBACKS = Counter("moerge_fallbacks", "Decisions served by the base model because an expert did not load", ["expert"])
REGISTRATIONS = Counter("moerge_registrations", "Registrations by outcome", ["outcome"])
EXPERTS = Gauge("moerge_experts", "Active experts")
RESIDENT = Gauge("moerge_resident_adapters", "Adapters loaded in the engine")
LOADS = Gauge("moerge_adapter_loads", "Adapters loaded into the engine since the start")
GENERATION = Gauge("moerge_registry_generation", "The registry generation that the router serves")
ROUTER_VERSION = Gauge("moerge_router_version", "What the router has learned: the version in force, 0 for nothing")
DECISIONS = Counter("moerge_decisions", "Decisions kept for feedback, or not", ["outcome"])
FEEDBACK = Counter("moerge_feedback", "Judgements of answers", ["judgement"])
TURNS = Counter("moerge_conversation_turns", "Later turns of conversations, by what was decided", ["outcome"])
NEAR_TIES = Counter("moerge_near_ties", "Decisions that went to an expert because it was loaded already")
READY = Gauge("moerge_ready", "1 when requests are answered")
COMPOSITES = Counter("moerge_composites", "Composites built, or found on disk", ["gate", "outcome"])
BLENDS = Counter("moerge_blends", "Blends built, or found on disk", ["operator", "outcome"])
COMPOSITE_BYTES = Gauge("moerge_composite_bytes", "Composites on disk, in bytes")
BLEND_BYTES = Gauge("moerge_blend_bytes", "Blends on disk, in bytes")
BUILD_SECONDS = Histogram(
    "moerge_build_seconds",
    "Time to build a composite or a blend",
    ["kind"],
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
)
CALIBRATIONS = Counter("moerge_calibrations", "Experts whose scores were measured on neutral prompts")
