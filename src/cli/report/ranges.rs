//! Ranges of blocks and spans of time, put together and taken from each other.

/// Ranges in order, joined where they touch.
pub(super) fn union(mut ranges: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    ranges.sort_unstable();
    let mut out: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (from, to) in ranges {
        match out.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => out.push((from, to)),
        }
    }
    out
}

/// What of `ranges` is not in `other`; both as of [`union`].
pub(super) fn without(ranges: &[(u32, u32)], other: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut out = Vec::new();
    let mut others = other.iter().peekable();
    for &(mut from, to) in ranges {
        while from < to {
            while others.peek().is_some_and(|other| other.1 <= from) {
                others.next();
            }
            match others.peek() {
                Some(other) if other.0 <= from => from = other.1.min(to),
                Some(other) if other.0 < to => {
                    out.push((from, other.0));
                    from = other.0;
                }
                _ => {
                    out.push((from, to));
                    from = to;
                }
            }
        }
    }
    out
}

pub(super) fn spans(mut spans: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut out: Vec<(f64, f64)> = Vec::with_capacity(spans.len());
    for (from, to) in spans {
        match out.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => out.push((from, to)),
        }
    }
    out
}

pub(super) fn length(spans: &[(f64, f64)]) -> f64 {
    spans.iter().map(|(from, to)| (to - from).max(0.0)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_taken_from_each_other() {
        let ranges = union(vec![(10, 20), (0, 5), (18, 30), (5, 6)]);
        assert_eq!(ranges, [(0, 6), (10, 30)]);
        assert_eq!(without(&ranges, &[(2, 3), (4, 12), (29, 99)]), [(0, 2), (3, 4), (12, 29)]);
        assert_eq!(without(&ranges, &[]), ranges);
        assert_eq!(without(&[], &ranges), []);
        assert_eq!(without(&[(0, 4), (5, 8)], &[(0, 8)]), []);
    }
}
