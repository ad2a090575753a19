"""Values that differ between processes are named, with the processes of each value."""

from jaxcl.host.agreement import _disagreements, check_processes_agree


def test_equal_reports_agree():
    assert _disagreements([{"seed": 0, "mesh": {"data": -1}}] * 3) == []


def test_each_value_is_listed_with_its_processes():
    reports = [{"seed": 0, "steps": 4}, {"seed": 1, "steps": 4}, {"seed": 0, "steps": 4}]
    assert _disagreements(reports) == ["seed is 0 in processes 0, 2 and 1 in process 1"]


def test_a_value_that_a_process_lacks_is_null():
    assert _disagreements([{}, {"fsdp": 2}]) == ["fsdp is null in process 0 and 2 in process 1"]


def test_many_processes_are_not_all_listed():
    (text,) = _disagreements([{"seed": int(process == 99)} for process in range(100)])
    assert text == "seed is 0 in processes 0, 1, 2, 3, 4, 5, 6, 7, … and 1 in process 99"


def test_one_process_agrees_with_itself():
    check_processes_agree({"seed": object()})  # which JSON cannot encode
