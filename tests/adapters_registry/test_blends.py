"""Stored blends, on SQLite and on PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import event

from adapters_registry.base import BaseSpec
from adapters_registry.blends import MOST_JSON, Blend, BlendMember, Ingredient, NewBlend
from adapters_registry.errors import BlendNotFound, BlendRefused, ExpertRefused, NotOwner
from adapters_registry.expert import Expert, State
from adapters_registry.registry import Registry

Register = Callable[..., Expert]


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def member(expert: Expert, weight: float = 0.5) -> BlendMember:
    return BlendMember(expert=expert.name, version=expert.version, digest=expert.digest, weight=weight)


def new(name: str | None, *experts: Expert, content: str = "", **more: Any) -> NewBlend:
    members = tuple(member(each) for each in experts)
    return NewBlend(name=name, digest=digest_of(content or f"{name}"), members=members, operator="cat", **more)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def codes(refused: pytest.ExceptionInfo[BlendRefused]) -> set[str]:
    return {reason.code for reason in refused.value.reasons}


@pytest.fixture
def a(registry: Registry, adapters: list[Path], register: Register) -> Expert:
    return register(registry, "a", adapters[0], licence="MIT")


@pytest.fixture
def b(registry: Registry, adapters: list[Path], register: Register) -> Expert:
    return register(registry, "b", adapters[1], licence="cc-by-nc-4.0")


class TestStoring:
    def test_a_blend_is_what_was_stored(self, registry: Registry, a: Expert, b: Expert) -> None:
        wanted = new(
            "both",
            a,
            b,
            description="Two.",
            settings={"density": 0.3},
            report={"rank": 8, "discarded": 0.0},
            search={"method": "lorahub", "loss": 0.1},
            lineage=(Ingredient(name="b", id=b.id, weight=0.5), Ingredient(name="a", id=a.id, weight=0.5)),
        )
        blend = registry.blends.create(wanted)
        assert blend == registry.blends.get("both") == registry.blends.get(blend.id)
        assert registry.blends.get(f"blend:{blend.digest}") == blend
        for field in NewBlend.model_fields:
            assert getattr(blend, field) == getattr(wanted, field), field
        assert blend.id == f"blend:{blend.digest[:12]}"
        assert blend.problems == ()
        assert [(each.expert, each.notes) for each in blend.licences] == [("b", ("non-commercial",)), ("a", ())]

    def test_storing_and_removing_are_changes_with_events(self, registry: Registry, a: Expert) -> None:
        before = registry.generation()
        blend = registry.blends.create(new("one", a, owner="ann"))
        assert registry.generation() == before + 1
        registry.blends.remove("one", tenant="ann")
        assert registry.generation() == before + 2
        created, removed = registry.events("one")
        assert (created.action, created.actor, removed.action) == ("create_blend", "ann", "remove_blend")
        assert created.detail == {"digest": blend.digest, "members": [a.id]}
        assert registry.blends.list() == []

    def test_one_without_a_name_is_known_by_its_content(self, registry: Registry, a: Expert) -> None:
        blend = registry.blends.create(new(None, a, content="x"))
        assert blend.name is None
        assert registry.blends.get(blend.id) == blend
        generation = registry.generation()
        assert registry.blends.create(new(None, a, content="x")) == blend, "the same again changes nothing"
        assert registry.generation() == generation
        again = registry.blends.create(new(None, a, content="x", description="Better told."))
        assert registry.blends.list() == [again]
        assert registry.blends.create(new(None, a, content="x", owner="ann")).owner == "ann"
        assert len(registry.blends.list()) == 2

    def test_a_name_is_listed_before_contents(self, registry: Registry, a: Expert) -> None:
        for name in (None, "y", "x"):
            registry.blends.create(new(name, a))
        assert [each.name for each in registry.blends.list()] == ["x", "y", None]

    def test_a_tenants_own_is_found_first_by_content(self, registry: Registry, a: Expert) -> None:
        registry.blends.create(new("anns", a, content="x", owner="ann"))
        registry.blends.create(new("bobs", a, content="x", owner="bob"))
        reference = f"blend:{digest_of('x')[:12]}"
        found = {tenant: registry.blends.get(reference, tenant).name for tenant in ("ann", "bob", "eve", None)}
        assert found == {"ann": "anns", "bob": "bobs", "eve": "anns", None: "anns"}
        registry.blends.create(new(None, a, content="x", owner="bob"))
        assert registry.blends.get(reference, "bob").name is None

    @pytest.mark.parametrize("reference", ["nothing", "blend:", "blend:0123", "blend:%", "../x", "a\ud800", "\0", ""])
    def test_what_is_not_there_is_not_found(self, registry: Registry, a: Expert, reference: str) -> None:
        registry.blends.create(new("one", a))
        with pytest.raises(BlendNotFound, match="Stored: one"):
            registry.blends.get(reference)
        with pytest.raises(BlendNotFound):
            registry.blends.remove(reference)


class TestRefusing:
    def test_every_reason_comes_at_once(
        self, registry: Registry, adapters: list[Path], register: Register, a: Expert, b: Expert
    ) -> None:
        register(registry, "b", adapters[2], new_version=True)
        gone = b.model_copy(update={"name": "gone"})
        with pytest.raises(BlendRefused) as refused:
            registry.blends.create(new("a", a, b, gone))
        assert codes(refused) == {"name_taken", "member_inactive", "unknown_member"}
        assert "version 1 of its member 'b' has given way to version 2" in str(refused.value)
        assert "No expert 'gone'. Registered: a, b." in str(refused.value)
        assert registry.blends.against(new("a", a, b, gone)) == list(refused.value.reasons)
        assert registry.blends.list() == []

    @pytest.mark.parametrize("name", ["auto", "tiny", "blend:1", "A", "", "../x", "a\n", "\ud800", "a\0"])
    def test_names_that_mean_something_else(self, registry: Registry, a: Expert, name: str) -> None:
        with pytest.raises(BlendRefused) as refused:
            registry.blends.create(new(name, a, content="x"))
        assert codes(refused) <= {"invalid_name", "reserved_name"}

    def test_experts_and_blends_share_one_space_of_names(
        self, registry: Registry, adapters: list[Path], register: Register, a: Expert
    ) -> None:
        registry.blends.create(new("one", a))
        with pytest.raises(ExpertRefused, match="taken, by a blend"):
            register(registry, "one", adapters[1])
        with pytest.raises(BlendRefused, match="taken, by an expert"):
            registry.blends.create(new("a", a), replace=True)

    def test_an_expert_cannot_take_a_name_while_it_is_being_registered(
        self, registry: Registry, adapters: list[Path], a: Expert
    ) -> None:
        from adapters_registry.proposal import FolderSource, Proposal

        proposal = Proposal(name="one", source=FolderSource(path=adapters[1]))
        with registry.prepare(proposal) as prepared:
            registry.blends.create(new("one", a))
            with pytest.raises(ExpertRefused, match="taken, by a blend"):
                registry.commit(prepared, state=State.ACTIVE)
        assert [each.name for each in registry.experts()] == ["a"]

    def test_a_taken_name_can_be_replaced_by_its_owner_only(self, registry: Registry, a: Expert, b: Expert) -> None:
        registry.blends.create(new("one", a, owner="ann"))
        with pytest.raises(BlendRefused, match="or pass replace"):
            registry.blends.create(new("one", b, owner="ann", content="y"))
        with pytest.raises(BlendRefused, match=r"already taken\. Choose another name\."):
            registry.blends.create(new("one", b, owner="bob", content="y"), replace=True)
        replaced = registry.blends.create(new("one", b, owner="ann", content="y"), replace=True)
        assert registry.blends.list() == [replaced]
        by_operator = registry.blends.create(new("one", a), replace=True)
        assert by_operator.owner == "ann", "the operator changes it, and it stays its owner's"
        assert [each.action for each in registry.events("one")] == ["create_blend", "replace_blend", "replace_blend"]

    def test_members_are_one_to_sixty_four_and_each_once(self, registry: Registry, a: Expert) -> None:
        with pytest.raises(BlendRefused, match="1 to 64 members, not 0"):
            registry.blends.create(new("none"))
        with pytest.raises(BlendRefused, match="a member twice"):
            registry.blends.create(new("twice", a, a))

    def test_what_no_database_should_keep(self, a: Expert) -> None:
        for wrong in (
            {"report": {"x": float("nan")}},
            {"search": {"x": "y" * MOST_JSON}},
            {"settings": nested(100_000)},
            {"description": "a\0"},
            {"description": "x" * 10_001},
        ):
            with pytest.raises(ValidationError):
                new("one", a, **wrong)
        with pytest.raises(ValidationError):
            member(a, float("inf"))
        with pytest.raises(ValidationError):
            BlendMember(expert="a", version=1, digest="../../etc", weight=1.0)


class TestMembersChange:
    @pytest.fixture
    def one(self, registry: Registry, a: Expert, b: Expert) -> Blend:
        return registry.blends.create(new("one", a, b, owner="ann"))

    def problems(self, registry: Registry, tenant: str | None = None) -> tuple[str, ...]:
        return registry.blends.get("one", tenant).problems

    def test_retiring_a_member_stops_the_blend_until_it_is_back(self, registry: Registry, one: Blend) -> None:
        registry.retire("a")
        assert self.problems(registry) == ("version 1 of its member 'a' is retired",)
        registry.rollback("a")
        assert self.problems(registry) == ()

    def test_a_new_version_does_not_change_what_was_tested(
        self, registry: Registry, adapters: list[Path], register: Register, one: Blend
    ) -> None:
        register(registry, "a", adapters[2], new_version=True)
        assert self.problems(registry) == ("version 1 of its member 'a' has given way to version 2",)
        assert registry.blends.get("one").members == one.members
        registry.rollback("a")
        assert self.problems(registry) == ()

    def test_quarantine_and_removal_stop_it(
        self, registry: Registry, adapters: list[Path], register: Register, one: Blend
    ) -> None:
        registry.quarantine("a", 1, ["It lies."])
        assert self.problems(registry) == ("version 1 of its member 'a' is quarantined",)
        register(registry, "a", adapters[2], new_version=True)
        registry.remove("a", 1)
        assert self.problems(registry) == ("version 1 of its member 'a' is not registered any more",)
        registry.remove("a")
        assert self.problems(registry) == ("its member 'a' is not registered any more",)
        assert registry.blends.get("one").licences[1].notes == ("unstated",), "nothing is known any more"

    def test_the_same_content_registered_again_brings_it_back(
        self, registry: Registry, adapters: list[Path], register: Register, one: Blend
    ) -> None:
        registry.remove("a")
        register(registry, "a", adapters[2])
        assert "version 1 of its member 'a' is not registered any more" in self.problems(registry)
        register(registry, "a", adapters[0], new_version=True)
        assert self.problems(registry) == ()

    def test_a_licence_that_is_corrected_counts(self, registry: Registry, one: Blend) -> None:
        registry.update("a", licence="cc-by-nc-noderivs-4.0")
        first = registry.blends.get("one").licences[0]
        assert (first.expert, first.notes) == ("a", ("no derivatives", "non-commercial"))


class TestTenants:
    @pytest.fixture
    def secret(self, registry: Registry, adapters: list[Path], register: Register) -> Expert:
        return register(registry, "secret", adapters[2], owner="ann", visibility="private", licence="Ann's own")

    def test_a_private_member_makes_the_blend_private(self, registry: Registry, a: Expert, secret: Expert) -> None:
        blend = registry.blends.create(new("one", a, secret, owner="ann", visibility="public"))
        assert blend.visibility == "private"
        assert registry.blends.get("one", "ann") == blend
        for reference in ("one", blend.id):
            with pytest.raises(BlendNotFound, match="Stored: none"):
                registry.blends.get(reference, "bob")
        assert registry.blends.list("bob") == []
        assert [each.name for each in registry.blends.list(None)] == ["one"]
        registry.update("secret", visibility="public")
        assert registry.blends.get("one").visibility == "private", "as it was stored"

    def test_anothers_private_expert_does_not_exist(self, registry: Registry, a: Expert, secret: Expert) -> None:
        nobody = secret.model_copy(update={"name": "nobody"})
        told = []
        for expert in (secret, nobody):
            with pytest.raises(BlendRefused) as refused:
                registry.blends.create(new("one", a, expert, owner="bob"))
            told.append(str(refused.value).replace(expert.name, "x"))
        assert told[0] == told[1]

    def test_anothers_private_blend_does_not_exist(self, registry: Registry, a: Expert) -> None:
        registry.blends.create(new("hidden", a, owner="ann", visibility="private"))
        registry.blends.create(new("shown", a, owner="ann"))
        for call in (registry.blends.get, lambda name, tenant: registry.blends.remove(name, tenant=tenant)):
            told = []
            for name in ("hidden", "nothing"):
                with pytest.raises(BlendNotFound) as unknown:
                    call(name, "bob")
                told.append(str(unknown.value).replace(name, "x"))
            assert told == ["No blend 'x'. Stored: shown."] * 2

    def test_only_its_owner_and_the_operator_remove_it(self, registry: Registry, a: Expert) -> None:
        registry.blends.create(new("one", a, owner="ann"))
        with pytest.raises(NotOwner, match="Blend 'one' belongs to somebody else"):
            registry.blends.remove("one", tenant="bob")
        assert registry.blends.remove("one", tenant=None).owner == "ann"

    def test_members_private_to_different_owners_are_nobodys(
        self, registry: Registry, adapters: list[Path], register: Register, secret: Expert
    ) -> None:
        bobs = register(registry, "bobs", adapters[3], owner="bob", visibility="private")
        with pytest.raises(BlendRefused) as refused:
            registry.blends.create(new("one", secret, bobs))
        assert codes(refused) == {"other_owners"}
        assert registry.blends.create(new("anns", secret)).visibility == "private"

    def test_the_operator_cannot_put_into_a_tenants_blend_what_the_tenant_may_not_see(
        self, registry: Registry, a: Expert, secret: Expert
    ) -> None:
        registry.blends.create(new("one", a, owner="bob"))
        with pytest.raises(BlendRefused, match="No expert 'secret'"):
            registry.blends.create(new("one", secret, content="y"), replace=True)

    def test_a_member_that_becomes_private_takes_the_blend_with_it(
        self, registry: Registry, adapters: list[Path], register: Register, a: Expert
    ) -> None:
        anns = register(registry, "anns", adapters[2], owner="ann")
        registry.blends.create(new("one", a, anns, owner="bob"))
        assert registry.blends.get("one", "eve").problems == ()
        registry.update("anns", visibility="private", tenant="ann")
        for tenant in ("eve", "ann"):
            with pytest.raises(BlendNotFound):
                registry.blends.get("one", tenant)
        hidden = registry.blends.get("one", "bob")
        registry.remove("anns", tenant="ann")
        assert registry.blends.get("one", "bob") == hidden, "to who may not see it, hidden is gone"
        assert hidden.problems == ("its member 'anns' is not registered any more",)


class TestNothingByHalves:
    def test_a_failure_before_the_end_leaves_no_row(self, registry: Registry, a: Expert) -> None:
        generation = registry.generation()

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        event.listen(registry._engine, "commit", fail)
        with pytest.raises(ZeroDivisionError):
            registry.blends.create(new("one", a))
        event.remove(registry._engine, "commit", fail)
        assert registry.blends.list() == []
        assert registry.generation() == generation
        registry.blends.create(new("one", a))

    def test_of_many_who_want_a_name_one_gets_it(self, registry: Registry, a: Expert) -> None:
        def store(number: int) -> bool:
            try:
                registry.blends.create(new("one", a, content=str(number)))
            except BlendRefused:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(store, range(8))) == 1
        assert len(registry.blends.list()) == 1

    def test_blends_outlast_a_restart(
        self, tmp_path: Path, base: BaseSpec, adapters: list[Path], register: Register
    ) -> None:
        with Registry.open(tmp_path / "again", base=base) as opened:
            stored = opened.blends.create(new("one", register(opened, "a", adapters[0])))
        with Registry.open(tmp_path / "again", base=base) as opened:
            assert opened.blends.list() == [stored]
