from dist_train.distributed.fault_report import FaultReport, FaultReports, verdict


def test_who_is_to_blame():
    def at(rank, batch, phase, doing, error=None):
        return FaultReport(rank, batch, batch, phase, doing, 30.0, error)

    behind = verdict({0: at(0, 7, 3, "update"), 1: at(1, 7, 1, "wait for data"), 2: at(2, 7, 3, "update")}, 3)
    assert behind == "rank 1 hangs at step 7 (wait for data, for 30 s); the others wait for it (update)"
    assert verdict({0: at(0, 7, 3, "update")}, 2).startswith("rank 1 left no report")
    failed = verdict({0: at(0, 7, 3, "update"), 1: at(1, 8, 1, "forward pass", "ValueError: no")}, 2)
    assert failed == "rank 1 failed at step 8 (forward pass): ValueError: no"
    together = verdict({0: at(0, 7, 2, "forward pass"), 1: at(1, 7, 2, "forward pass")}, 2)
    assert together == "all ranks hang at step 7 (forward pass)"


def test_a_report_that_cannot_be_read_hides_no_other(tmp_path):
    reports = FaultReports(tmp_path, 4)
    for rank in (0, 2, 3):
        reports.write(FaultReport(rank, 1, 1, 1, "update", 2.0, None), None)
    (tmp_path / "rank1.txt").write_text('{"rank": 1, "of_another_version": 0}\n')
    assert sorted(reports.read()) == [0, 2, 3]
