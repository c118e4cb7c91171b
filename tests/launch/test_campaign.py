"""A short form of tests/campaign.py: faults at random moments change nothing of how a run ends."""

from tests.campaign import Campaign


def test_faults_at_random_moments_change_nothing(tmp_path):
    campaign = Campaign(tmp_path, seed=3, kinds=["kill a rank", "kill the launcher", "SIGHUP", "fill the disk"])
    campaign.trial(0, faults=3)
    assert sum(campaign.counts.values()) >= 1
    assert campaign.wrong == []
