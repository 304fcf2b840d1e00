//! Sets of device blocks, as ranges in order that do not touch.

use std::ops::Range;

/// A set of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<Range<u32>>);

impl Ranges {
    /// The set of all blocks of these ranges, in any order.
    pub(super) fn new(mut ranges: Vec<Range<u32>>) -> Self {
        ranges.retain(|range| range.start < range.end);
        ranges.sort_unstable_by_key(|range| range.start);
        let mut set: Vec<Range<u32>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match set.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => set.push(range),
            }
        }
        Self(set)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Range<u32>> {
        self.0.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.0.iter().map(|range| u64::from(range.end - range.start)).sum()
    }

    /// The ranges that meet `range`.
    fn meeting(&self, range: &Range<u32>) -> &[Range<u32>] {
        let from = self.0.partition_point(|own| own.end <= range.start);
        let to = self.0.partition_point(|own| own.start < range.end);
        self.0.get(from..to.max(from)).unwrap_or_default()
    }

    /// Whether a block of `range` is in the set.
    pub(super) fn meets(&self, range: &Range<u32>) -> bool {
        range.start < range.end && !self.meeting(range).is_empty()
    }

    /// The parts of `range` that are in the set.
    pub(super) fn within(&self, range: &Range<u32>) -> impl Iterator<Item = Range<u32>> {
        let whole = range.clone();
        self.meeting(range).iter().map(move |own| own.start.max(whole.start)..own.end.min(whole.end))
    }

    /// The parts of `range` that are not in the set.
    pub(super) fn outside(&self, range: &Range<u32>) -> impl Iterator<Item = Range<u32>> {
        let end = range.end;
        let mut at = range.start;
        let mut meeting = self.meeting(range).iter();
        std::iter::from_fn(move || {
            while at < end {
                let (start, next) = (at, meeting.next());
                let stop = next.map_or(end, |own| own.start.min(end));
                at = next.map_or(end, |own| own.end);
                if start < stop {
                    return Some(start..stop);
                }
            }
            None
        })
    }

    /// The blocks of this set that are not in the other one.
    pub(super) fn without(&self, other: &Self) -> Self {
        Self::new(self.0.iter().flat_map(|range| other.outside(range)).collect())
    }

    /// The blocks of both.
    pub(super) fn with(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_do_what_sets_of_numbers_do() {
        // Every subset of nine blocks against a handful of others.
        let blocks = |bits: u32| (0..9).filter(|bit| bits >> bit & 1 == 1).map(|bit| bit..bit + 1).collect::<Vec<_>>();
        let bits = |set: &Ranges| set.iter().flat_map(Clone::clone).fold(0, |bits, block| bits | 1u32 << block);
        for left in 0..512 {
            let set = Ranges::new(blocks(left));
            assert_eq!((bits(&set), set.blocks()), (left, u64::from(left.count_ones())));
            for right in [0, 1, 0b1_0000_0001, 0b0_1010_1010, 0b1_1111_1111, 0b0_0111_1100] {
                let other = Ranges::new(blocks(right));
                assert_eq!(bits(&set.without(&other)), left & !right);
                assert_eq!(bits(&set.with(&other)), left | right);
            }
            for (start, end) in [(0, 9), (2, 5), (4, 4), (8, 9)] {
                let mask = (1u32 << end) - (1 << start);
                let (within, outside): (Vec<_>, Vec<_>) =
                    (set.within(&(start..end)).collect(), set.outside(&(start..end)).collect());
                assert_eq!(bits(&Ranges::new(within)), left & mask);
                assert_eq!(bits(&Ranges::new(outside)), !left & mask);
                assert_eq!(set.meets(&(start..end)), left & mask != 0);
            }
        }
    }
}
