#![allow(clippy::unwrap_used, reason = "tests")]
use proptest::prelude::*;

use super::*;

const HEX: &str = "dbcc1c35ac38df41fd2f5e4130b32ffdb93ebae8b3dbe638c23575912276fc9c";

fn normal(input: &str) -> String {
    input.parse::<Reference>().unwrap().to_string()
}

/// Written form, registry, repository: what the upstream module's own tests state.
#[test]
fn registries_and_repositories_are_told_apart_as_upstream_does() {
    for (input, registry, repository) in [
        ("debian", "docker.io", "library/debian"),
        ("library/debian", "docker.io", "library/debian"),
        ("docker.io/debian", "docker.io", "library/debian"),
        ("docker.io/library/debian", "docker.io", "library/debian"),
        ("index.docker.io/debian", "docker.io", "library/debian"),
        (
            "index.docker.io/library/debian",
            "docker.io",
            "library/debian",
        ),
        ("docker/docker", "docker.io", "docker/docker"),
        (
            "index.docker.io/docker/docker",
            "docker.io",
            "docker/docker",
        ),
        ("library/foo/bar", "docker.io", "library/foo/bar"),
        ("docker.io/library/foo/bar", "docker.io", "library/foo/bar"),
        ("store/foo/bar", "docker.io", "store/foo/bar"),
        ("other/library", "docker.io", "other/library"),
        (
            "ubuntu-12.04-base",
            "docker.io",
            "library/ubuntu-12.04-base",
        ),
        ("test_com/foo", "docker.io", "test_com/foo"),
        ("test.com/foo", "test.com", "foo"),
        ("test.com:8080/foo", "test.com:8080", "foo"),
        ("test-com:8080/foo", "test-com:8080", "foo"),
        ("xn--n3h.com:18080/foo", "xn--n3h.com:18080", "foo"),
        ("localhost/foo", "localhost", "foo"),
        ("localhost/library/debian", "localhost", "library/debian"),
        ("localhost:5000/foo/bar", "localhost:5000", "foo/bar"),
        ("127.0.0.1:5000/debian", "127.0.0.1:5000", "debian"),
        ("192.168.0.1:8/debian", "192.168.0.1:8", "debian"),
        ("192.168.0.1", "docker.io", "library/192.168.0.1"),
        ("[fc00::1]:5000/docker", "[fc00::1]:5000", "docker"),
        (
            "[fc00:1:2:3:4:5:6:7]:5000/library/debian",
            "[fc00:1:2:3:4:5:6:7]:5000",
            "library/debian",
        ),
        ("Foo/bar", "Foo", "bar"),
        ("FOO/bar", "FOO", "bar"),
        (
            "LOCALDOMAIN/library/debian",
            "LOCALDOMAIN",
            "library/debian",
        ),
        ("dock__er/docker", "docker.io", "dock__er/docker"),
        (
            "docker---rules/docker",
            "docker.io",
            "docker---rules/docker",
        ),
        ("d/docker", "docker.io", "d/docker"),
        ("localhost", "docker.io", "library/localhost"),
    ] {
        let parsed: Reference = input.parse().unwrap();
        assert_eq!(
            (parsed.registry.as_str(), parsed.repository.as_str()),
            (registry, repository),
            "{input}"
        );
        assert_eq!(parsed.tag.as_deref(), Some("latest"), "{input}");
        assert_eq!(parsed.digest, None, "{input}");
    }
    // Hexadecimal, but with a registry or not of 64 digits: an ordinary name.
    assert_eq!(
        normal(&format!("docker.io/{HEX}")),
        format!("docker.io/library/{HEX}:latest")
    );
    assert_eq!(
        normal(&HEX[1..]),
        format!("docker.io/library/{}:latest", &HEX[1..])
    );
}

#[test]
fn tags_and_digests_are_normalised() {
    let digest = format!("sha256:{HEX}");
    assert_eq!(normal("redis:7.2"), "docker.io/library/redis:7.2");
    assert_eq!(normal("192.168.0.1:80"), "docker.io/library/192.168.0.1:80");
    assert_eq!(
        normal("localhost:5000/a/b:_x.Y-1"),
        "localhost:5000/a/b:_x.Y-1"
    );
    let by_digest = format!("docker.io/library/redis@{digest}");
    assert_eq!(normal(&format!("redis@{digest}")), by_digest);
    assert_eq!(normal(&format!("redis:7.2@{digest}")), by_digest);
    let parsed: Reference = format!("redis:7.2@{digest}").parse().unwrap();
    assert_eq!((parsed.tag, parsed.digest), (None, Some(digest)));
}

#[test]
fn malformed_references_are_refused() {
    let long_repository = "a/".repeat(130) + "b";
    let long_tag = format!("a:{}", "t".repeat(129));
    let long_registry = format!("{}.com/a", "r".repeat(260));
    for bad in [
        "",
        " ",
        "$$$",
        "::",
        ":tag",
        "@",
        "a@",
        "a:",
        "/",
        "//",
        "a/",
        "/a",
        "a//b",
        "https://github.com/docker/docker",
        "docker/Docker",
        "docker.io/docker/Docker",
        "Debian",
        "-docker",
        "-docker/docker",
        "docker-/docker",
        "-docker.io/docker/docker",
        "docker///docker",
        "____/____",
        "_docker/_docker",
        "dock..er/docker",
        "dock_.er/docker",
        "dock-.er/docker",
        "dock___er/docker",
        "docker/",
        "[fc00::1]",
        "[fc00::1]:5000",
        "fc00::1:5000/debian",
        "[fe80::1%eth0]:5000/debian",
        "[2001:db8:3:4::192.0.2.33]:5000/debian",
        "[]/a",
        "[fc00::1/a",
        "[fc00::1]x/a",
        "host:/a",
        "host:port/a",
        "foo_bar.com/x",
        "a..b/x",
        ".com/x",
        "exa-.com/x",
        HEX,
        "busybox:-foo",
        "busybox:.foo",
        "a:b:c",
        "a:b/c:d/",
        "a b",
        "a\n",
        "ä",
        "../etc/passwd",
        "a/../b",
        ".",
        "..",
        "a/.",
        &long_repository,
        &long_tag,
        &long_registry,
        "a@sha256:dbcc1c35",
        &format!("a@sha256:{}", HEX.to_uppercase()),
        &format!("a@sha512:{HEX}{HEX}"),
        &format!("a@md5:{HEX}"),
        &format!("a@sha256:{HEX}0"),
        &format!("a@sha256:{HEX}@sha256:{HEX}"),
        &format!("@sha256:{HEX}"),
    ] {
        let refused = bad.parse::<Reference>();
        assert!(refused.is_err(), "{bad:?} became {refused:?}");
    }
}

#[test]
fn an_error_names_input_and_what_is_allowed() {
    let error = "docker/Docker".parse::<Reference>().unwrap_err();
    assert_eq!(error.input, "docker/Docker");
    assert!(error.to_string().contains("lower case"), "{error}");
    let huge = "x".repeat(1 << 20);
    assert!(huge.parse::<Reference>().unwrap_err().to_string().len() < 1000);
}

#[test]
fn the_longest_allowed_parts_parse() {
    let path = "a".repeat(255);
    assert_eq!(
        normal(&format!("h.io/{path}")),
        format!("h.io/{path}:latest")
    );
    // With "library/" it would be longer than allowed.
    assert!(path.parse::<Reference>().is_err());
    let tag = "t".repeat(128);
    assert_eq!(
        normal(&format!("a:{tag}")),
        format!("docker.io/library/a:{tag}")
    );
}

#[test]
fn familiar_forms() {
    for (input, familiar) in [
        ("docker.io/library/ubuntu", "ubuntu:latest"),
        ("docker.io/fooo/bar:1", "fooo/bar:1"),
        ("library/foo/bar", "library/foo/bar:latest"),
        (
            "example.com:8000/private/moonbase",
            "example.com:8000/private/moonbase:latest",
        ),
    ] {
        assert_eq!(input.parse::<Reference>().unwrap().familiar(), familiar);
    }
}

proptest! {
    #[test]
    fn parsing_never_panics_and_the_normal_form_is_stable(input in "\\PC{0,80}") {
        stable(&input)?;
    }

    #[test]
    fn references_made_of_likely_parts_are_stable(
        input in "(([a-zA-Z0-9.-]{1,8}|localhost|\\[[0-9a-f:]{2,5}\\])(:[0-9]{0,4})?/)?\
                  [a-z0-9._/-]{1,20}(:[a-zA-Z0-9._-]{0,10})?(@sha256:[0-9a-f]{62,65})?"
    ) {
        stable(&input)?;
    }
}

fn stable(input: &str) -> Result<(), TestCaseError> {
    let Ok(parsed) = input.parse::<Reference>() else {
        return Ok(());
    };
    prop_assert!(parsed.tag.is_some() != parsed.digest.is_some());
    prop_assert!(parsed.repository.len() <= 255);
    for form in [parsed.to_string(), parsed.familiar()] {
        prop_assert_eq!(form.parse::<Reference>(), Ok(parsed.clone()), "{}", form);
    }
    Ok(())
}
