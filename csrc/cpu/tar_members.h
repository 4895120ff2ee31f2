// The members of a tar from its 512-byte headers, as diffprune/tar_members.py has them in Python: plain files only.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

namespace diffprune::cpu {

// Members grouped into samples: keys and where each ends in `keys`, the number of each sample's first member, the
// extensions as they are spelt, and of each member: the number of its extension, header's and data's offsets, size, stamp.
struct Samples {
  std::string keys;
  std::vector<int64_t> key_ends, first;
  std::vector<std::string> extensions;
  std::vector<int32_t> codes;
  std::array<std::vector<int64_t>, 3> places;
  std::vector<uint32_t> stamps;
};

class TarMembers {
 public:
  // Takes plain files' headers, from `offset` of a file of `size` bytes on, while they lie in `window`, which begins at
  // `base`, and stops at any other header. Returns the offset of the next header, and the widest gap between those taken.
  std::pair<int64_t, int64_t> take(std::string_view window, int64_t base, int64_t offset, int64_t size);

  // A member whose header was looked at elsewhere. `stamp`: as stamp_of in diffprune/tar_headers.py.
  void add(std::string_view name, int64_t header_offset, int64_t data_offset, int64_t size, uint32_t stamp);

  // Headers with the mode, owner and device fields of this one are plain from now on.
  void trust(std::string_view header);

  // All members as samples, or nothing where something is odd: a name without an extension, not ASCII or with control
  // characters, a key or an extension that comes twice, a sample with something between its members.
  std::optional<Samples> grouped() const;

  // All members: name, header's offset, data's offset, size, stamp.
  std::vector<std::tuple<std::string_view, int64_t, int64_t, int64_t, uint32_t>> members() const;

 private:
  std::string_view name(size_t member) const;

  std::string names_;
  std::vector<size_t> name_ends_;
  std::array<std::vector<int64_t>, 3> places_;  // header's offset, data's offset, size
  std::vector<uint32_t> stamps_;
  std::string last_trusted_;
  std::unordered_set<std::string> trusted_;
};

}  // namespace diffprune::cpu
