"""The embedded corpus: its streams, its exact information, and the claim that no story has two derivations."""

import math
import statistics
from itertools import islice

import pytest

from basic.stories import entropy_nats, num_stories, parse, stories, story_nats


def test_a_seed_fixes_the_stories():
    assert list(stories(7, 50)) == list(stories(7, 50))
    assert list(stories(7, 50)) != list(stories(8, 50))


@pytest.mark.parametrize("count", [0, 1, 10])
def test_fewer_stories_are_the_beginning_of_more(count):
    assert list(stories(3, count)) == list(stories(3, 20))[:count] == list(islice(stories(3), count))


def test_every_story_has_one_derivation_with_the_information_it_was_drawn_with():
    for story in stories(1, 2000):
        derivations, _ = parse(story.text)
        assert len(derivations) == 1, story.text
        assert math.isclose(derivations[0], story.nats, abs_tol=1e-9)
        assert story_nats(story.text) == derivations[0]


def test_there_are_more_stories_than_anyone_can_read():
    assert num_stories() >= 10**12


def test_the_exact_entropy_is_the_mean_information_of_a_sample():
    nats = [story.nats for story in stories(2, 20_000)]
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - entropy_nats()) < 4 * standard_error


@pytest.mark.parametrize(("text", "position"), [("", 0), ("Once upon a crime", 12)])
def test_a_text_that_is_no_story_is_refused_where_it_stops_being_one(text, position):
    with pytest.raises(ValueError, match=f"character {position}"):
        story_nats(text)


def test_a_story_that_goes_on_is_refused_at_its_end():
    text = next(stories(5)).text
    with pytest.raises(ValueError, match=f"character {len(text)}"):
        story_nats(text + " The end.")


@pytest.mark.parametrize(("arguments", "error"), [((-1,), ValueError), ((1, -1), ValueError), ((1.5,), TypeError)])
def test_bad_arguments_are_refused_at_once(arguments, error):
    with pytest.raises(error):
        stories(*arguments)
