"""The router as a library: no server, no engine, no adapter weights. Which expert of a manifest would answer?

python examples/router_library.py examples/mistral-lora-land/manifest.yaml "Write a headline: A phone folds twice."
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapters_registry.expert import Expert, State
from adapters_registry.manifest import read_manifest
from adapters_registry.proposal import Proposal
from router.decision import Decision
from router.encoder import Encoder, SentenceTransformerEncoder
from router.router import Router

# ruff: noqa: T201 (it prints)


def described(proposal: Proposal, base_model: str) -> Expert:
    """An expert as the router sees it: a name and its samples. Rank, digest and path concern the engine only."""
    about = {"description": proposal.description or "", "samples": proposal.samples, "source": str(proposal.source)}
    fields = {"version": 1, "digest": "0" * 64, "path": Path(), "rank": 8, "target_modules": (), "state": State.ACTIVE}
    return Expert.model_validate({"name": proposal.name, "base_model": base_model, **fields, **about})


def route(manifest: Path, prompts: list[str], encoder: Encoder) -> list[Decision]:
    """A decision for each prompt, by the default method."""
    content = read_manifest(manifest)
    router = Router(encoder)
    try:
        router.refresh(described(proposal, content.base_model.name) for proposal in content.proposals)
        return [router.route_sync(prompt) for prompt in prompts]
    finally:
        router.close()


if __name__ == "__main__":
    # The MiniLM that comes with the package; any sentence-transformers model by name instead.
    for decision in route(Path(sys.argv[1]), sys.argv[2:], SentenceTransformerEncoder()):
        names = ", ".join(each.expert for each in decision.experts) or f"base model ({decision.reason})"
        print(f"{names}  confidence {decision.confidence:.2f}")
        for candidate in decision.candidates:
            print(f"  {candidate.score:.3f}  {candidate.expert}")
