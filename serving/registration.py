"""From a proposal to an expert in service: fetch, validate, try it on the engine, embed its samples, commit.

Whole or absent: nothing is registered before the last step, which is one transaction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from adapters_registry.errors import ExpertRefused, Reason, RegistryError, SameContent
from adapters_registry.expert import Check, Expert, State
from adapters_registry.proposal import HubSource, Proposal
from adapters_registry.prototypes import prototypes_of
from router.encoder import Vectors
from router.takeover import Takeover, takeover
from router.triggers import Step
from serving import metrics
from serving.engine import AdapterLoadFailed, EngineUnavailable
from serving.internal import post
from serving.neutral import NEUTRAL
from serving.recipes import expert_adapter
from serving.service import Service

#: Told of every stage (fetch, validate, store, try, embed, done) with a fraction in [0, 1].
Progress = Callable[[str, float], None]

#: Samples that the behaviour check asks, characters read of each, and tokens it compares.
PROBES, PROBE_CHARS, PROBE_TOKENS = 4, 500, 8
#: What the first expert takes.
NOTHING_TAKEN = Takeover((), 0, 0.0, 0.0)


async def register(service: Service, proposal: Proposal, progress: Progress, *, stage: bool = False) -> Expert:
    """Register an expert; unless staged or quarantined, the next request can be routed to it.

    With `stage` the version is kept aside, to be promoted later. An adapter that changes nothing is quarantined, and
    so is one whose samples are those of several other experts.
    Raises ExpertRefused with every reason, SourceError, StoreFull, EngineUnavailable.
    """
    outcome = "failed"
    try:
        if service.failure is not None:
            raise EngineUnavailable(service.failure)
        prepared = await asyncio.to_thread(service.registry.prepare, proposal, progress)
        try:
            progress("try", 0.0)
            effect = await behaviour(service, prepared.expert)
            progress("embed", 0.0)
            prototypes = await asyncio.to_thread(prototypes_of, prepared.expert, service.router.embed)
            checks = [effect, await asyncio.to_thread(confusion, service, prepared.expert, prototypes)]
            reasons = [check.detail for check in checks if not check.passed]
            state = State.QUARANTINED if reasons else State.STAGED if stage else State.ACTIVE
            expert = await asyncio.to_thread(
                service.registry.commit,
                prepared,
                state=state,
                checks=checks,
                reasons=reasons,
                prototypes={service.router.encoder_id: prototypes},
            )
        except BaseException:
            await service.residency.release(prepared.expert.id)
            raise
        finally:
            await asyncio.to_thread(prepared.close)
        await service.refresh()
        if state is not State.ACTIVE:
            await service.residency.release(expert.id)
        outcome = state.value
        progress("done", 1.0)
        return expert
    except ExpertRefused:
        outcome = "refused"
        raise
    finally:
        metrics.REGISTRATIONS.labels(outcome).inc()


async def sync_manifest(
    service: Service, proposals: Sequence[Proposal], tell: Callable[[int, Proposal, str], None]
) -> None:
    """Register what a manifest lists and the registry does not have; new content becomes a new version.

    `tell(position, proposal, outcome)` is told of each. An expert that is refused does not stop the others.
    """
    for position, proposal in enumerate(proposals, start=1):
        active = service.active(proposal.name)
        if active is not None and has_source(active, proposal):
            outcome = "kept"
        else:
            try:
                expert = await register(service, proposal.model_copy(update={"new_version": True}), lambda *_: None)
                outcome = expert.state.value
            except ExpertRefused as error:
                outcome = "kept" if same_content(error) is not None else str(error)
            except RegistryError as error:
                outcome = str(error)
        if outcome == "kept" and active is not None and active.samples != proposal.samples:
            update = service.registry.update
            await asyncio.to_thread(update, active.name, samples=proposal.samples, description=proposal.description)
        tell(position, proposal, outcome)
    await service.refresh()


def same_content(error: ExpertRefused) -> SameContent | None:
    """The version of the refused name that has this very content, when that is all there is against it."""
    match error.reasons:
        case (SameContent(expert=name) as same,) if name == error.name:
            return same
    return None


def has_source(expert: Expert, proposal: Proposal) -> bool:
    """A Hub repository is looked at again only when the manifest asks for another revision of it."""
    source = proposal.source
    if not isinstance(source, HubSource):
        return False
    origin, _, subfolder = expert.source.partition("#")
    wanted = f"hub:{source.repo}@{source.revision or ''}"
    return origin.startswith(wanted) and subfolder == (source.subfolder or "").strip("/")


async def behaviour(service: Service, expert: Expert) -> Check:
    """Does the adapter change what the base model says on the expert's own samples?

    The figure is the largest change of a next-token log-probability (nats) over a few samples and tokens, as far
    as both say the same. Raises ExpertRefused when the engine does not take the adapter.
    """
    prompts = [sample.prompt[:PROBE_CHARS] for sample in expert.samples[:PROBES]] or list(NEUTRAL[:PROBES])
    adapter, limit = expert_adapter(expert), service.settings.registry.min_effect
    try:
        async with service.residency.lease(adapter):
            models = (service.engine.base_model, adapter.name)
            asked = [ask(service, model, prompt) for prompt in prompts for model in models]
            answers = await asyncio.gather(*asked)
    except AdapterLoadFailed as error:
        raise ExpertRefused(expert.name, [Reason("engine_refused", str(error))]) from error
    effect = max(difference(base, tried) for base, tried in zip(answers[::2], answers[1::2], strict=True))
    detail = f"changes next-token log-probabilities by up to {effect:.3g} nats on {len(prompts)} prompts"
    if not (passed := math.isfinite(effect) and effect >= limit):
        detail += f"; at least {limit:g} is expected of an adapter that does something"
    value = effect if math.isfinite(effect) else None  # databases have no NaN
    return Check(name="behaviour", passed=passed, value=value, limit=limit, detail=detail)


def confusion(service: Service, expert: Expert, prototypes: Vectors) -> Check:
    """Whose held-out samples would the expert take? Blocks.

    The figure is the share of its samples that the lesser of two experts loses, both of which lose them though they
    are unlike each other. Experts that the newcomer's owner may not see are neither compared nor told of.
    """
    limit, library = service.settings.registry.max_takeover, service.router.library
    found = takeover(library, expert.name, prototypes, library.visible(expert.owner)) if library else NOTHING_TAKEN
    detail = str(found)
    if not (passed := found.value <= limit):
        detail += f"; more than {limit:.0%} of two that are unlike each other is a takeover"
    return Check(name="takeover", passed=passed, value=found.value, limit=limit, detail=detail)


async def ask(service: Service, model: str, prompt: str) -> list[Step]:
    """Greedy continuation: (token, log-probabilities of the likeliest tokens) for each step."""
    body = {"model": model, "prompt": prompt, "max_tokens": PROBE_TOKENS, "temperature": 0, "logprobs": 5}
    response = await post(service.engine, "/v1/completions", body)
    if response.status_code >= 500:
        raise EngineUnavailable(f"The engine could not answer the behaviour check: {response.text:.300}")
    if response.status_code >= 400:
        return []  # this prompt does not suit the model (too long, say); the others decide
    logprobs: dict[str, Any] = response.json()["choices"][0]["logprobs"]
    return list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


def difference(base: list[Step], tried: list[Step]) -> float:
    """Largest difference of log-probabilities up to and including the first step where the answers part.

    NaN when a figure is not a number, so that broken adapters do not pass.
    """
    largest = 0.0
    for (token, before), (other, after) in zip(base, tried, strict=False):
        for each in before.keys() & after.keys():
            change = abs(before[each] - after[each])
            largest = change if math.isnan(change) else max(largest, change)
            if math.isnan(largest):
                return largest
        if token != other:
            return max(largest, abs(before[token] - after.get(token, min(after.values(), default=0.0))))
    return largest
