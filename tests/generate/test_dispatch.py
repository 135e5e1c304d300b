import math
import random

import pytest

from chainforge.generate.dispatch import Breaker, Limiter


class World:
    """A server that grants `limit` requests of one second each, and a client that is eager."""

    def __init__(self, limit, ceiling=500, **options):
        self.limit, self.limiter = limit, Limiter(ceiling, **options)
        self.now, self.under_way, self.answered, self.refused = 0.0, [], 0, 0

    def run(self, seconds, failing=0.0, moody=0.0):
        draw = random.Random(0)
        end = self.now + seconds
        count = 0
        while self.now < end:
            while self.limiter.wait(self.now) is None:
                ticket = self.limiter.send()
                if len(self.under_way) >= self.limit or draw.random() < moody:
                    self.limiter.refused(ticket, self.now, None)
                    self.refused += 1
                    break
                self.under_way.append((self.now + 1.0, ticket))
            self.now += 0.05
            ended = [item for item in self.under_way if item[0] <= self.now]
            self.under_way = [item for item in self.under_way if item[0] > self.now]
            for _, ticket in ended:
                count += 1
                if failing and count % int(1 / failing) == 0:
                    self.limiter.failed()
                else:
                    self.limiter.answered(ticket, self.now)
                    self.answered += 1
        return self


def test_the_level_doubles_until_the_first_refusal():
    world = World(limit=400).run(3.5)
    assert world.limiter.level >= 8 * 2**3
    assert world.refused == 0


@pytest.mark.parametrize("limit", [1, 3, 20, 100])
def test_the_limit_is_found_and_used(limit):
    world = World(limit).run(10)
    before = world.answered
    world.run(60)
    assert (world.answered - before) / (60 * limit) > (0.9 if limit > 5 else 0.6)
    assert world.refused < 45


def test_a_limit_that_rises_is_followed():
    world = World(20).run(30)
    world.limit = 60
    world.run(400)
    assert world.limiter.level > 40


def test_a_limit_that_falls_is_followed():
    world = World(40).run(20)
    world.limit, refused = 5, world.refused
    world.run(40)
    assert world.limiter.level <= 8
    assert world.refused - refused < 60


def test_a_server_that_refuses_at_random_is_not_taken_for_a_small_one():
    world = World(limit=100, ceiling=30).run(20)
    before = world.answered
    world.run(100, moody=0.03)
    assert (world.answered - before) / (100 * 30) > 0.75
    assert world.run(20).limiter.level == 30


def test_other_failures_pause_growth_and_cut_nothing():
    world = World(400, start=8)
    ticket = world.limiter.send()
    world.limiter.failed()
    assert world.limiter.level == 8
    for _ in range(8):
        ticket = world.limiter.send()
    world.limiter.answered(ticket, 0.0)  # pays for the failure
    assert world.limiter.level == 8
    assert World(400).run(5, failing=0.1).limiter.level > 50


def test_a_burst_of_refusals_is_one_cut():
    limiter = Limiter(100, start=40)
    tickets = [limiter.send() for _ in range(40)]
    for ticket in tickets[20:]:
        limiter.refused(ticket, 0.0, None)
    assert limiter.level == 32
    assert limiter.wait(0.0) is None


def test_when_fewer_are_refused_too_all_wait_as_long_as_asked():
    limiter = Limiter(100, start=10)
    limiter.refused(limiter.send(), 0.0, 5.0)
    assert limiter.wait(0.0) is None
    limiter.refused(limiter.send(), 0.1, 5.0)
    assert limiter.wait(0.1) == pytest.approx(5.0)
    assert limiter.wait(5.2) is None


def test_the_level_stays_within_its_bounds():
    assert World(1000, ceiling=30).run(20).limiter.level == 30
    assert Limiter(3).level == 3
    limiter = Limiter(10, start=1)
    limiter.refused(limiter.send(), 0.0, None)
    assert limiter.level == 1


def test_the_breaker_opens_probes_and_closes():
    breaker = Breaker(threshold=3, first_pause=1.0, timeout=5.0)
    for _ in range(2):
        breaker.failed(0.0)
    assert breaker.wait(0.0, 0) is None
    breaker.failed(0.0)
    assert breaker.wait(0.0, 0) == 1.0
    assert breaker.wait(2.0, 1) == math.inf  # one at a time
    assert breaker.wait(2.0, 0) is None
    breaker.failed(2.0)
    assert breaker.wait(2.0, 0) == 2.0
    assert not breaker.hopeless(4.0)
    assert breaker.hopeless(5.0)
    breaker.answered()
    assert breaker.wait(2.0, 0) is None
    assert not breaker.hopeless(9.0)
