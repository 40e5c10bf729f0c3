"""The pool on gevent, whenever it patches: what is special to greenlets.

What every runtime must do is in tests/contract, which runs on gevent, too.
"""

from __future__ import annotations

import pytest

from tests.gevent import scenes

EVERYWHERE = (
    scenes.an_idle_pool_wakes_nothing,
    scenes.statements_of_many_greenlets_run_at_the_same_time,
    scenes.a_statement_cut_off_by_a_timeout_is_not_the_next_borrowers,
    scenes.a_waiter_that_is_killed_takes_nothing_with_it,
    scenes.the_end_of_an_idle_session_is_noticed_in_the_hub,
    scenes.a_greenlet_that_waits_for_itself_is_told_and_no_other,
    scenes.a_report_names_the_greenlet_and_its_place,
)

ONCE = (
    scenes.a_lease_that_is_dropped_comes_home_from_anywhere,
    scenes.borrowing_in_the_hub_is_refused_at_once,
    scenes.a_deadline_of_the_users_code_is_kept,
    scenes.a_slow_name_look_up_stops_no_other_greenlet,
    scenes.a_connect_of_a_tracers_stops_no_other_greenlet,
    scenes.greenlets_killed_at_any_moment_lose_nothing,
)

# Each in a process of its own: they leave it changed, or need it fresh.
ALONE = (
    scenes.several_hubs_share_a_pool,
    scenes.the_first_use_may_be_in_a_native_thread,
    scenes.a_forked_child_has_its_own_sessions_and_disturbs_none,
    scenes.a_destroyed_hub_is_replaced,
    scenes.another_thread_wakes_the_hub_of_this_one,
)


def named(found):
    return pytest.mark.parametrize("scene", found, ids=lambda scene: scene.__name__)


@pytest.mark.parametrize(
    ("mode", "driver"),
    [
        *(("first", "psycopg"), ("late", "psycopg"), ("forked", "psycopg")),
        *(("first", "psycopg2"), ("forked", "psycopg2")),
    ],
)
@named(EVERYWHERE)
def test_it_works_whenever_gevent_patches(stage, scene, mode, driver):
    stage.play(scene, mode=mode, driver=driver, together=EVERYWHERE)


@pytest.mark.parametrize(("mode", "driver"), [("first", "psycopg"), ("late", "psycopg2")])
@named(ONCE)
def test_it_does_what_threads_do(stage, scene, mode, driver):
    stage.play(scene, mode=mode, driver=driver, together=ONCE)


@named(ALONE)
def test_it_stands_hubs_and_forks(stage, scene):
    stage.play(scene, mode="late", driver="psycopg")


def test_a_fork_with_psycopg2_disturbs_none(stage):
    scene = scenes.a_forked_child_has_its_own_sessions_and_disturbs_none
    stage.play(scene, mode="first", driver="psycopg2")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connect_that_is_under_way_at_a_fork_is_the_parents(stage, driver):
    scene = scenes.a_connect_that_is_under_way_at_a_fork_is_the_parents
    stage.play(scene, mode="first", driver=driver)


@pytest.mark.parametrize(("mode", "driver"), [("first", "psycopg"), ("late", "psycopg2")])
def test_a_server_that_says_nothing_stops_no_other_greenlet(stage, mode, driver):
    stage.play(scenes.a_server_that_says_nothing_stops_no_other_greenlet, mode=mode, driver=driver)


@pytest.mark.parametrize(("mode", "driver"), [("late", "psycopg"), ("first", "psycopg2")])
def test_ten_thousand_requests_with_random_timeouts_lose_nothing(stage, mode, driver):
    scene = scenes.ten_thousand_requests_with_random_timeouts_lose_nothing
    stage.play(scene, mode=mode, driver=driver)


def test_two_greenlets_that_share_a_connection_take_turns(stage):
    """Not psycopg2: it refuses that itself."""
    scene = scenes.two_greenlets_that_share_a_connection_take_turns
    stage.play(scene, mode="late", driver="psycopg")


def test_a_wait_callback_that_somebody_else_has_set_stays(stage):
    stage.play(scenes.a_wait_callback_that_is_set_stays, mode="first", driver="psycopg2")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_pool_that_was_used_before_gevent_patched_is_put_right(stage, driver):
    """Where gevent was imported by then, as in a master of gunicorn's."""
    stage.play(scenes.a_statement_lets_other_greenlets_run, mode="used", driver=driver)
