# The target llama: llama.cpp's sources, patches/ applied, native/ added.

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${CMAKE_CURRENT_LIST_DIR}/llama_sources.py" "${ADASKIP_PATCHES}/series")
file(GLOB ADASKIP_PATCH_FILES CONFIGURE_DEPENDS
    "${ADASKIP_PATCHES}/*.patch" "${ADASKIP_PATCHES}/${ADASKIP_VERSION}/*")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${ADASKIP_PATCH_FILES})

set(sources_command "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/llama_sources.py"
    --release "${ADASKIP_VERSION}" --patches "${ADASKIP_PATCHES}" --work "${CMAKE_CURRENT_BINARY_DIR}")
if(ADASKIP_SDIST)
    list(APPEND sources_command --sdist "${ADASKIP_SDIST}")
endif()
execute_process(COMMAND ${sources_command} RESULT_VARIABLE result
    OUTPUT_VARIABLE ADASKIP_LLAMA ERROR_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT result EQUAL 0)
    adaskip_fail("${reason}")
endif()

set(BUILD_SHARED_LIBS        ON)
set(LLAMA_USE_SYSTEM_GGML    ON)
set(LLAMA_BUILD_COMMON       OFF)
set(LLAMA_BUILD_IS_DEV       OFF)
set(LLAMA_BUILD_NUMBER       0)
set(LLAMA_BUILD_COMMIT       "llama-cpp-python-${ADASKIP_VERSION}") # not our own commit, which git would find
set(CMAKE_CXX_STANDARD       17)
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW) # option() of llama.cpp keeps the variables set here
set(CMAKE_SKIP_INSTALL_RULES OFF)

# Paths of this build appear in llama.cpp's assertions through __FILE__: name the tree instead.
foreach(map IN ITEMS "${CMAKE_CURRENT_SOURCE_DIR}=adaskip-cpp" "${ADASKIP_GGML_PREFIX}=ggml"
                     "${CMAKE_CURRENT_BINARY_DIR}=build" "${ADASKIP_LLAMA}=llama.cpp")
    if(NOT MSVC)
        add_compile_options("-ffile-prefix-map=${map}")
    endif()
endforeach()

# EXCLUDE_FROM_ALL also leaves llama.cpp's own install rules out.
add_subdirectory("${ADASKIP_LLAMA}" llama EXCLUDE_FROM_ALL)

file(GLOB ADASKIP_NATIVE CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/native/*.cpp")
# The third number of llama-cpp-python's version, such as 36, for what differs between releases of llama.cpp.
string(REGEX REPLACE "^[0-9]+\\.[0-9]+\\.([0-9]+).*" "\\1" ADASKIP_RELEASE "${ADASKIP_VERSION}")
target_compile_definitions(llama PRIVATE "ADASKIP_RELEASE=${ADASKIP_RELEASE}")
target_include_directories(llama PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/native" "${ADASKIP_LLAMA}/src")
if(ADASKIP_NATIVE)
    target_sources(llama PRIVATE ${ADASKIP_NATIVE})
    set_source_files_properties(${ADASKIP_NATIVE} TARGET_DIRECTORY llama PROPERTIES
        SKIP_UNITY_BUILD_INCLUSION ON
        COMPILE_OPTIONS "$<IF:$<CXX_COMPILER_ID:MSVC>,/W4,-Wall;-Wextra>")
endif()
