//! Values of settings, as they are written in the file, in the environment and behind flags.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Patience;
use crate::daemon::attachment::Transport;
use crate::pool::Amount;
use crate::source::BlobPlace;

/// A size in bytes, written as a number with an optional unit: `K`, `M`, `G`, `T`, each a power of 1024, also `KiB`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(format!("{text:?} is not a size: write bytes, or a number with K, M, G or T")),
        };
        let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size: it must start with a number"))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("{text:?} is too large"))
    }
}

/// A [`Size`], or a part of the disk: `20%`.
impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(number) = text.strip_suffix('%') else { return text.parse().map(|Size(bytes)| Self::Bytes(bytes)) };
        match number.trim().parse() {
            Ok(percent @ 0..=100) => Ok(Self::Percent(percent)),
            _ => Err(format!("{text:?} is no part of a disk: write 0% to 100%")),
        }
    }
}

/// A number from 1 to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count<const MAX: u16>(pub u16);

impl<const MAX: u16> FromStr for Count<MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse() {
            Ok(number) if (1..=MAX).contains(&number) => Ok(Self(number)),
            _ => Err(format!("{text:?} is not a number from 1 to {MAX}")),
        }
    }
}

impl<'de, const MAX: u16> Deserialize<'de> for Count<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_toml(deserializer)
    }
}

/// Places of blobs, separated by spaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(pub Vec<BlobPlace>);

impl FromStr for Places {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// Yes or no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "1" | "true" | "yes" | "on" => Ok(Self(true)),
            "0" | "false" | "no" | "off" => Ok(Self(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        }
    }
}

/// What containers get to mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountKind {
    /// An overlay over the image's device, which all its containers share: for runc.
    #[default]
    Overlay,
    /// A block device of their own, which they can write to: for Kata's virtual machines.
    Block,
}

impl FromStr for MountKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "overlay" => Ok(Self::Overlay),
            "block" => Ok(Self::Block),
            _ => Err(format!("{text:?} is neither overlay nor block")),
        }
    }
}

/// A plain word, which can be a directory's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(pub String);

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.is_empty() || text.contains('/') || text.starts_with('.') {
            true => Err(format!("{text:?} is not a plain word")),
            false => Ok(Self(text.to_owned())),
        }
    }
}

/// `auto`, or a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportChoice(pub String);

impl Default for TransportChoice {
    fn default() -> Self {
        Self("auto".to_owned())
    }
}

impl FromStr for TransportChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text == "auto" || Transport::named(text).is_some() {
            true => Ok(Self(text.to_owned())),
            false => Err(format!("{text:?} is no transport: write auto, ublk, nbd or loop")),
        }
    }
}

/// In the file a value is its text, or the TOML type that says the same.
fn from_toml<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<T, D::Error> {
    let text = match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => text,
        // A list is its parts, separated as in the environment.
        toml::Value::Array(parts) if parts.iter().all(toml::Value::is_str) => {
            parts.iter().filter_map(toml::Value::as_str).collect::<Vec<_>>().join(" ")
        }
        value @ (toml::Value::Integer(_) | toml::Value::Boolean(_)) => value.to_string(),
        value => return Err(de::Error::custom(format!("{value} is neither text, a number nor true or false"))),
    };
    text.parse().map_err(de::Error::custom)
}

macro_rules! deserialize_from_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                from_toml(deserializer)
            }
        }
    )*};
}
deserialize_from_text!(Amount, MountKind, Name, Patience, Places, Size, Switch, TransportChoice);

impl Serialize for Patience {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
