"""The registry's behaviour, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig

from adapters_registry.base import BaseSpec
from adapters_registry.errors import (
    ExpertNotFound,
    ExpertRefused,
    InvalidTransition,
    NotOwner,
    RegistryUnusable,
    VersionNotFound,
)
from adapters_registry.expert import Check, Expert, Sample, State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry

Register = Callable[..., Expert]


def proposal(name: str, folder: Path, **details: Any) -> Proposal:
    return Proposal(name=name, source=FolderSource(path=folder), **details)


def staging(registry: Registry) -> list[Path]:
    return list((registry.store.root / ".staging").iterdir())


class TestRegistering:
    def test_a_registered_expert_is_what_was_proposed(self, registry: Registry, adapters: list[Path]) -> None:
        wanted = proposal(
            "reverse",
            adapters[0],
            description="Spells words backwards.",
            licence="MIT",
            tags=("spelling",),
            training_data=("generated",),
            samples=(Sample(prompt="Spell abc backwards", answer="cba"),),
            owner="ann",
            visibility="private",
        )
        check = Check(name="changes_the_output", passed=True, value=0.4, limit=0.01)
        with registry.prepare(wanted) as prepared:
            expert = registry.commit(prepared, state=State.ACTIVE, checks=[check])
        assert expert == registry.get("reverse")
        assert (expert.version, expert.state, expert.rank) == (1, State.ACTIVE, 4)
        assert expert.target_modules == ("q_proj", "v_proj")
        assert expert.base_model == "tiny"
        assert expert.source == f"folder:{adapters[0]}"
        assert expert.checks == (check,)
        for field in ("description", "licence", "tags", "training_data", "samples", "owner", "visibility"):
            assert getattr(expert, field) == getattr(wanted, field)

    def test_the_store_holds_a_folder_that_peft_reads(self, registry: Registry, adapters: list[Path]) -> None:
        with registry.prepare(proposal("a", adapters[0])) as prepared:
            assert prepared.expert.path.name == prepared.expert.digest
            assert PeftConfig.from_pretrained(str(prepared.expert.path)).peft_type == "LORA"
            saved = (adapters[0] / "adapter_model.safetensors").read_bytes()
            assert (prepared.expert.path / "adapter_model.safetensors").read_bytes() == saved
            assert not prepared.expert.path.stat().st_mode & 0o222, "read-only"

    def test_nothing_remains_of_a_registration_that_is_not_committed(
        self, registry: Registry, adapters: list[Path]
    ) -> None:
        with registry.prepare(proposal("a", adapters[0])) as prepared:
            assert registry.store.digests() == [prepared.expert.digest]
        assert registry.store.digests() == []
        assert staging(registry) == []
        assert registry.experts() == []
        assert registry.generation() == 0

    def test_an_error_in_between_leaves_nothing(self, registry: Registry, adapters: list[Path]) -> None:
        with pytest.raises(ZeroDivisionError), registry.prepare(proposal("a", adapters[0])):
            raise ZeroDivisionError
        assert registry.store.digests() == []

    def test_progress_goes_through_the_stages_in_order(self, registry: Registry, adapters: list[Path]) -> None:
        told: list[tuple[str, float]] = []
        with registry.prepare(proposal("a", adapters[0]), progress=lambda *step: told.append(step)):
            pass
        stages = list(dict.fromkeys(stage for stage, _ in told))
        assert stages == ["fetch", "validate", "store"]
        assert all(0 <= fraction <= 1 for _, fraction in told)

    def test_all_reasons_come_at_once(self, registry: Registry, adapter: Path, register: Register) -> None:
        register(registry, "a", adapter)
        (adapter / "adapter_model.safetensors").write_bytes(b"no")
        (adapter / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 999, "lora_alpha": 1, "use_dora": true}'
        )
        with pytest.raises(ExpertRefused) as refused:
            registry.prepare(proposal("a", adapter))
        assert refused.value.codes == {
            "name_taken",
            "malformed_weights",
            "rank_too_high",
            "unsupported_feature",
        }
        assert staging(registry) == []

    @pytest.mark.parametrize("name", ["auto", "tiny", "blend:1", "auto:x", "../x", "A", "", "a" * 65, "ä", "a\n", "-a"])
    def test_names_that_mean_something_else_are_refused(
        self, registry: Registry, adapters: list[Path], name: str
    ) -> None:
        with pytest.raises(ExpertRefused) as refused:
            registry.prepare(proposal(name, adapters[0]))
        assert refused.value.codes <= {"invalid_name", "reserved_name"}

    def test_a_taken_name_is_refused(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        register(registry, "a", adapters[0])
        with pytest.raises(ExpertRefused, match="pass new_version"):
            register(registry, "a", adapters[1])

    def test_content_is_registered_once(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        register(registry, "a", adapters[0])
        with pytest.raises(ExpertRefused, match="'a' version 1"):
            register(registry, "b", adapters[0])
        assert len(registry.store.digests()) == 1

    def test_anothers_private_content_stays_a_secret(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0], owner="ann", visibility="private")
        mine = register(registry, "b", adapters[0], owner="bob", visibility="private")
        registry.remove("b")
        assert registry.collect() == [], "ann's expert has the same files"
        assert mine.path.is_dir()

    def test_removed_content_can_be_registered_again(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0])
        registry.remove("a")
        assert register(registry, "a", adapters[0]).path.is_dir()
        assert registry.collect() == []

    def test_a_quarantined_version_keeps_its_reasons_and_is_not_served(
        self, registry: Registry, adapters: list[Path]
    ) -> None:
        with registry.prepare(proposal("a", adapters[0])) as prepared:
            registry.commit(prepared, state=State.QUARANTINED, reasons=["No effect: 0.0 nats."])
        assert registry.experts() == []
        [expert] = registry.experts(states=[State.QUARANTINED])
        assert expert.reasons == ("No effect: 0.0 nats.",)
        with pytest.raises(VersionNotFound, match=r"no active version. Versions: 1 \(quarantined\)"):
            registry.get("a")

    def test_a_new_version_cannot_be_born_retired(self, registry: Registry, adapters: list[Path]) -> None:
        with registry.prepare(proposal("a", adapters[0])) as prepared, pytest.raises(InvalidTransition):
            registry.commit(prepared, state=State.RETIRED)


class TestConcurrency:
    def test_one_of_many_wins_a_name(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        assert self._winners(registry, [("a", folder) for folder in adapters], register) == 1
        assert len(registry.store.digests()) == 1

    def test_one_of_many_wins_a_content(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        assert self._winners(registry, [(f"a{index}", adapters[0]) for index in range(6)], register) == 1
        [expert] = registry.experts()
        assert expert.path.is_dir()

    def test_different_experts_do_not_disturb_each_other(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        jobs = [(f"a{index}", folder) for index, folder in enumerate(adapters)]
        assert self._winners(registry, jobs, register) == len(adapters)
        assert registry.generation() == len(adapters)

    def test_two_prepared_for_one_name_commit_once(self, registry: Registry, adapters: list[Path]) -> None:
        with (
            registry.prepare(proposal("a", adapters[0])) as one,
            registry.prepare(proposal("a", adapters[1])) as two,
        ):
            registry.commit(one, state=State.ACTIVE)
            with pytest.raises(ExpertRefused) as refused:
                registry.commit(two, state=State.ACTIVE)
        assert refused.value.codes == {"name_taken"}
        assert registry.generation() == 1, "a refused change does not count"

    def test_preparing_the_same_content_twice_shares_the_folder_until_both_are_done(
        self, registry: Registry, adapters: list[Path]
    ) -> None:
        one = registry.prepare(proposal("a", adapters[0]))
        two = registry.prepare(proposal("b", adapters[0]))
        one.close()
        assert two.expert.path.is_dir()
        assert registry.collect() == [], "the second still needs it"
        two.close()
        assert registry.store.digests() == []

    @staticmethod
    def _winners(registry: Registry, jobs: list[tuple[str, Path]], register: Register) -> int:
        def attempt(job: tuple[str, Path]) -> bool:
            try:
                register(registry, *job)
            except ExpertRefused as refused:
                unexpected = refused.codes - {"name_taken", "content_registered"}
                return bool(unexpected)  # counted as a winner too many
            return True

        with ThreadPoolExecutor(len(jobs)) as threads:
            return sum(threads.map(attempt, jobs))


class TestVersions:
    @pytest.fixture
    def three(self, registry: Registry, adapters: list[Path], register: Register) -> Registry:
        for folder in adapters[:3]:
            register(registry, "a", folder, new_version=True)
        return registry

    def active(self, registry: Registry) -> int:
        return registry.get("a").version

    def test_a_new_version_takes_over(self, three: Registry) -> None:
        states = [expert.state for expert in three.versions("a")]
        assert states == [State.RETIRED, State.RETIRED, State.ACTIVE]

    def test_rollback_returns_to_the_version_before_and_forth_again(self, three: Registry) -> None:
        assert three.rollback("a").version == 2
        assert three.rollback("a").version == 3
        assert self.active(three) == 3

    def test_rollback_after_retiring_brings_the_last_one_back(self, three: Registry) -> None:
        three.retire("a")
        assert three.experts() == []
        assert three.rollback("a").version == 3

    def test_rollback_skips_the_quarantined(self, three: Registry) -> None:
        three.quarantine("a", 2, ["wrong answers"])
        assert three.rollback("a").version == 1

    def test_rollback_needs_somewhere_to_go(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        register(registry, "a", adapters[0])
        register(registry, "a", adapters[1], state=State.STAGED, new_version=True)
        with pytest.raises(InvalidTransition, match="Promote one by its number"):
            registry.rollback("a")

    def test_promoting_changes_which_version_answers(self, three: Registry) -> None:
        three.promote("a", 1)
        assert self.active(three) == 1
        assert three.rollback("a").version == 3

    def test_promoting_the_active_version_changes_nothing(self, three: Registry) -> None:
        three.promote("a", 3)
        assert three.rollback("a").version == 2

    def test_a_quarantined_version_is_promoted_only_by_force(self, three: Registry) -> None:
        three.quarantine("a", 3, ["wrong answers"])
        assert three.experts() == []
        with pytest.raises(InvalidTransition, match="wrong answers"):
            three.promote("a", 3)
        assert three.promote("a", 3, force=True).state is State.ACTIVE

    def test_removing_a_version_never_frees_its_number(
        self, three: Registry, adapters: list[Path], register: Register
    ) -> None:
        three.remove("a", 3)
        assert [expert.version for expert in three.versions("a")] == [1, 2]
        assert register(three, "a", adapters[3], new_version=True).version == 4

    def test_removing_the_last_version_removes_the_name(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0])
        registry.remove("a", 1)
        with pytest.raises(ExpertNotFound):
            registry.versions("a")

    def test_files_stay_while_in_use(self, three: Registry) -> None:
        digests = {expert.digest for expert in three.versions("a")}
        kept = three.get("a").digest
        three.remove("a")
        assert set(three.store.digests()) == digests
        assert set(three.collect(in_use={kept})) == digests - {kept}
        assert three.collect() == [kept]

    def test_unknown_versions_and_names_say_what_there_is(self, three: Registry) -> None:
        with pytest.raises(
            VersionNotFound, match=r"no version 9. Versions: 1 \(retired\), 2 \(retired\), 3 \(active\)"
        ):
            three.get("a", 9)
        with pytest.raises(ExpertNotFound, match=r"No expert 'b'\. Registered: a\."):
            three.get("b")


class TestTenants:
    @pytest.fixture
    def private(self, registry: Registry, adapters: list[Path], register: Register) -> Registry:
        register(registry, "open", adapters[0], owner="ann")
        register(registry, "secret", adapters[1], owner="ann", visibility="private")
        return registry

    def test_a_private_expert_exists_for_its_owner_and_the_operator(self, private: Registry) -> None:
        names = {tenant: [expert.name for expert in private.experts(tenant)] for tenant in (None, "ann", "bob")}
        assert names == {None: ["open", "secret"], "ann": ["open", "secret"], "bob": ["open"]}

    @pytest.mark.parametrize(
        "call",
        [
            lambda registry, name: registry.get(name, tenant="bob"),
            lambda registry, name: registry.versions(name, tenant="bob"),
            lambda registry, name: registry.promote(name, 1, tenant="bob"),
            lambda registry, name: registry.rollback(name, tenant="bob"),
            lambda registry, name: registry.retire(name, tenant="bob"),
            lambda registry, name: registry.quarantine(name, 1, ["x"], tenant="bob"),
            lambda registry, name: registry.update(name, description="x", tenant="bob"),
            lambda registry, name: registry.remove(name, tenant="bob"),
        ],
    )
    def test_anothers_private_expert_looks_like_no_expert(
        self, private: Registry, call: Callable[[Registry, str], object]
    ) -> None:
        with pytest.raises(ExpertNotFound) as hidden:
            call(private, "secret")
        with pytest.raises(ExpertNotFound) as missing:
            call(private, "nothing")
        assert str(hidden.value).replace("secret", "nothing") == str(missing.value)
        assert type(hidden.value) is type(missing.value)

    def test_a_public_expert_is_changed_only_by_its_owner(self, private: Registry) -> None:
        with pytest.raises(NotOwner):
            private.retire("open", tenant="bob")
        assert private.retire("open", tenant="ann").state is State.RETIRED
        assert private.rollback("open").state is State.ACTIVE, "the operator may"

    def test_only_the_owner_adds_versions(self, private: Registry, adapters: list[Path], register: Register) -> None:
        with pytest.raises(ExpertRefused, match="Choose another name"):
            register(private, "open", adapters[2], owner="bob", new_version=True)
        assert register(private, "open", adapters[2], owner="ann", new_version=True).version == 2
        added = register(private, "open", adapters[3], owner=None, new_version=True)
        assert (added.version, added.owner) == (3, "ann")


class TestUpdating:
    def test_only_what_is_given_changes(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        before = register(registry, "a", adapters[0], description="old", tags=("x",))
        after = registry.update("a", description="new", visibility="private")
        assert after == before.model_copy(update={"description": "new", "visibility": "private"})
        assert registry.get("a") == after

    def test_fields_can_be_emptied(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        register(registry, "a", adapters[0], description="old", tags=("x",), samples=(Sample(prompt="p"),))
        after = registry.update("a", description="", tags=(), samples=())
        assert (after.description, after.tags, after.samples) == ("", (), ())

    @pytest.mark.parametrize(
        ("change", "stale"),
        [({"samples": [Sample(prompt="q")]}, True), ({"tags": ["x"]}, False), ({"description": ""}, False)],
    )
    def test_new_samples_make_prototypes_stale(
        self,
        registry: Registry,
        adapters: list[Path],
        register: Register,
        change: dict[str, Any],
        stale: bool,
    ) -> None:
        register(registry, "a", adapters[0], samples=(Sample(prompt="p"),), description="")
        registry.set_prototypes("a", 1, "minilm", [[1.0]])
        registry.update("a", **change)
        assert (registry.prototypes("minilm") == {}) is stale

    @pytest.mark.parametrize("text", ["a\0b", "\ud800"])
    def test_text_that_cannot_be_stored_is_refused(
        self, registry: Registry, adapters: list[Path], register: Register, text: str
    ) -> None:
        register(registry, "a", adapters[0], description="old")
        with pytest.raises(ValueError, match=r"NUL|surrogates"):
            registry.update("a", description=text)
        assert registry.get("a").description == "old"
        assert registry.generation() == 1


class TestGeneration:
    def test_every_change_is_seen_and_recorded(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        changes: list[tuple[str, Callable[[], object]]] = [
            ("register", lambda: register(registry, "a", adapters[0], owner="ann")),
            ("register", lambda: register(registry, "a", adapters[1], owner="ann", new_version=True)),
            ("promote", lambda: registry.promote("a", 1, tenant="ann")),
            ("rollback", lambda: registry.rollback("a")),
            ("retire", lambda: registry.retire("a")),
            ("quarantine", lambda: registry.quarantine("a", 1, ["bad"])),
            ("update", lambda: registry.update("a", version=2, tags=["x"])),
            ("prototypes", lambda: registry.set_prototypes("a", 2, "minilm", [[1.0]])),
            ("remove", lambda: registry.remove("a", 1)),
            ("remove", lambda: registry.remove("a")),
        ]
        for number, (_, change) in enumerate(changes, start=1):
            change()
            assert registry.generation() == number
        events = registry.events("a")
        assert [event.action for event in events] == [action for action, _ in changes]
        assert [event.generation for event in events] == list(range(1, len(changes) + 1))
        assert events[2].actor == "ann"
        assert events[3].actor is None
        assert events[5].detail == {"reasons": ["bad"]}

    def test_what_changes_nothing_does_not_count(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0], tags=("x",))
        registry.promote("a", 1)
        registry.update("a", tags=["x"], visibility="public")
        assert registry.generation() == len(registry.events()) == 1

    def test_a_change_that_fails_changes_nothing(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0])
        with pytest.raises(VersionNotFound):
            registry.promote("a", 2)
        assert registry.generation() == 1
        assert len(registry.events()) == 1


class TestPrototypes:
    def test_they_come_back_as_they_were(self, registry: Registry, adapters: list[Path]) -> None:
        matrix = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
        with registry.prepare(proposal("a", adapters[0])) as prepared:
            expert = registry.commit(prepared, state=State.ACTIVE, prototypes={"minilm": matrix})
        np.testing.assert_array_equal(registry.prototypes("minilm")[expert.id], matrix)
        assert registry.prototypes("other") == {}

    def test_by_default_those_of_the_active_versions(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        old, new = (register(registry, "a", folder, new_version=True) for folder in adapters[:2])
        for expert in (old, new):
            registry.set_prototypes("a", expert.version, "minilm", [[float(expert.version)]])
        assert list(registry.prototypes("minilm")) == [new.id]
        assert list(registry.prototypes("minilm", [old.id, "nobody@0"])) == [old.id]

    def test_writing_the_same_again_is_no_change(
        self, registry: Registry, adapters: list[Path], register: Register
    ) -> None:
        register(registry, "a", adapters[0])
        registry.set_prototypes("a", 1, "minilm", [[1.0, 2.0]])
        before = registry.generation()
        registry.set_prototypes("a", 1, "minilm", [[1.0, 2.0]])
        assert registry.generation() == before
        registry.set_prototypes("a", 1, "minilm", [[1.0, 3.0]])
        assert registry.generation() == before + 1

    @pytest.mark.parametrize("values", [[1.0, 2.0], np.zeros((0, 3)), [[float("nan")]]])
    def test_anything_but_a_finite_matrix_is_a_mistake(
        self, registry: Registry, adapters: list[Path], register: Register, values: Any
    ) -> None:
        register(registry, "a", adapters[0])
        with pytest.raises(ValueError, match="finite"):
            registry.set_prototypes("a", 1, "minilm", values)

    def test_they_go_with_their_version(self, registry: Registry, adapters: list[Path], register: Register) -> None:
        register(registry, "a", adapters[0])
        registry.set_prototypes("a", 1, "minilm", [[1.0]])
        registry.remove("a")
        assert registry.prototypes("minilm") == {}


class TestOpening:
    def test_everything_is_there_after_closing(
        self,
        tmp_path: Path,
        database_url: str | None,
        base: BaseSpec,
        adapters: list[Path],
        register: Register,
    ) -> None:
        with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
            expert = register(registry, "a", adapters[0], samples=(Sample(prompt="p"),))
        with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
            assert registry.experts() == [expert]
            assert registry.generation() == 1

    def test_two_at_once_see_each_others_changes(
        self,
        tmp_path: Path,
        database_url: str | None,
        base: BaseSpec,
        adapters: list[Path],
        register: Register,
    ) -> None:
        def opened() -> Registry:
            return Registry.open(tmp_path / "data", url=database_url, base=base)

        with opened() as one, one.prepare(proposal("a", adapters[0])) as prepared, opened() as two:
            assert prepared.expert.path.is_dir(), "opening does not collect what another one is about to commit"
            one.commit(prepared, state=State.ACTIVE)
            assert two.get("a") == one.get("a")
            assert two.generation() == 1

    def test_many_may_open_a_new_one_at_once(self, tmp_path: Path, database_url: str | None, base: BaseSpec) -> None:
        def open_and_close(_: int) -> int:
            with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
                return registry.generation()

        with ThreadPoolExecutor(6) as threads:
            assert set(threads.map(open_and_close, range(6))) == {0}

    def test_another_base_model_is_refused_and_an_alias_is_not(
        self,
        tmp_path: Path,
        database_url: str | None,
        base: BaseSpec,
        adapters: list[Path],
        register: Register,
    ) -> None:
        with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
            register(registry, "a", adapters[0])
        other = BaseSpec(name="other", modules=base.modules)
        with pytest.raises(RegistryUnusable, match="holds experts of base model tiny, not of 'other'"):
            Registry.open(tmp_path / "data", url=database_url, base=other)
        renamed = BaseSpec(name="other", modules=base.modules, aliases=frozenset({"Tiny"}))
        Registry.open(tmp_path / "data", url=database_url, base=renamed).close()
